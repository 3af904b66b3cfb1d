"""``kernelize`` on random trees of modules, compared with the documented rules."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.eager.kernelization import KernelForward
from tests.support.toys import (
    ToyRepository,
)

INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


class Leaf(nn.Module):
    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


@use_kernel_forward_from_hub("A")
class A(Leaf):
    pass


class InheritsA(A):
    pass


class OverridesA(A):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@use_kernel_forward_from_hub("B", condition=lambda module: module.wanted)
class PickyB(Leaf):
    pass


class InheritsB(PickyB):
    pass


@use_kernel_forward_from_hub("A")
class ContainerA(nn.Sequential):
    """An extensible layer that holds others."""

    wanted = True

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


class HubTen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 10


class HubTwenty(nn.Module):
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x + 20


# For each class: its layer name, whether it has a condition, and what its reference adds.
ORACLE: dict[type, tuple[str | None, bool, int]] = {
    Leaf: (None, False, 0),
    A: ("A", False, 0),
    InheritsA: ("A", False, 0),
    OverridesA: (None, False, 1),
    PickyB: ("B", True, 0),
    InheritsB: ("B", True, 0),
    ContainerA: ("A", False, 0),
}
ADDS = {HubTen: 10, HubTwenty: 20}


def own_forward(x: Tensor) -> Tensor:
    return x + 1000


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    pool: list[nn.Module] = []

    def module(depth: int) -> nn.Module:
        if pool and draw(st.integers(0, 5)) == 0:
            return draw(st.sampled_from(pool))  # shared
        if depth and draw(st.booleans()):
            container = draw(st.sampled_from([nn.Sequential, nn.ModuleList, ContainerA]))
            children = [module(depth - 1) for _ in range(draw(st.integers(0, 4)))]
            made = container(*children) if container is not nn.ModuleList else container(children)
        else:
            leaf = draw(st.sampled_from([c for c in ORACLE if c is not ContainerA]))
            made = leaf(draw(st.booleans()))
        if type(made) in ORACLE and draw(st.integers(0, 5)) == 0:
            made.forward = own_forward
        pool.append(made)
        return made

    return nn.Sequential(*(module(2) for _ in range(draw(st.integers(1, 4)))))


KERNELS = st.sampled_from([HubTen, HubTwenty]).map(ToyRepository)
INFERENCE_MODES = [INFERENCE, INFERENCE | Mode.TORCH_COMPILE, Mode.FALLBACK]
REGISTRATIONS = st.one_of(
    KERNELS,
    st.dictionaries(st.sampled_from(INFERENCE_MODES), KERNELS, max_size=3),
    st.dictionaries(st.just(TRAINING), st.just(ToyRepository(HubTen)), max_size=1),
)
MAPPINGS = st.dictionaries(
    st.sampled_from(["A", "B", "C"]),
    st.dictionaries(st.sampled_from(["cpu", "npu"]), REGISTRATIONS, max_size=2),
    max_size=3,
)


def expected(module: nn.Module, mode: Mode, mapping: Any) -> int:
    """What ``module`` adds to its input after kernelize, by the documented rules."""
    name, conditional, reference = ORACLE[type(module)]
    if vars(module).get("forward") is own_forward:
        return 1000
    if name is None or (conditional and not module.wanted):
        return reference
    registered = mapping.get(name, {}).get("cpu", {})
    if isinstance(registered, ToyRepository):
        registered = {Mode.FALLBACK: registered}
    order = [TRAINING, Mode.FALLBACK]
    if mode is INFERENCE:
        order = [INFERENCE, INFERENCE | Mode.TORCH_COMPILE, *order]
    for candidate in order:
        if candidate in registered:
            kernel = registered[candidate].layer
            if mode is TRAINING and kernel is HubTwenty:
                return reference
            return ADDS[kernel]
    return reference


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Every module in ``module`` that is in the oracle, itself included; shared ones repeatedly."""
    below = [layer for child in module.children() for layer in layers_of(child)]
    return [module, *below] if type(module) in ORACLE else below


def added(module: nn.Module) -> float:
    return module(torch.zeros(())).item()


@settings(max_examples=150)
@given(trees(), st.sampled_from([INFERENCE, TRAINING]), MAPPINGS, MAPPINGS)
def test_any_model_runs_what_the_rules_say(
    model: nn.Module, mode: Mode, mapping: Any, earlier: Any
) -> None:
    original = {module: dict(vars(module)) for module in model.modules()}
    with use_kernel_mapping(earlier, inherit_mapping=False):
        kernelize(model, mode=INFERENCE, device="cpu")
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu")

    layers = layers_of(model)
    assert [added(layer) for layer in layers] == [expected(x, mode, mapping) for x in layers]
    on_kernels = {x for x in layers if expected(x, mode, mapping) in (10, 20)}
    bound = {m for m in model.modules() if type(vars(m).get("forward")) is KernelForward}
    assert bound == on_kernels
    report = last_report()
    assert {model.get_submodule(d.path) for d in report.kernels} == on_kernels
    assert len(report.kernels) == len(on_kernels)

    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu")
    assert last_report() == report
    assert [added(layer) for layer in layers] == [expected(x, mode, mapping) for x in layers]

    with use_kernel_mapping({}, inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu")
    assert {module: vars(module) for module in model.modules()} == original
