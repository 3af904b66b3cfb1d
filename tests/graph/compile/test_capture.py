"""Capture: which layers become ops, and that a compiled model follows their values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import (
    last_report,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from kernelgraph.report import Reason
from tests.support.compiled_models import assert_same, by_hand, compiled
from tests.support.toy_models import Chain, OpaqueScale, Repository, Scale, TraceableScale, on_cpu


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


@torch.no_grad()
def test_functions_become_ops() -> None:
    @use_kernel_forward_from_hub("double")
    def double(x: Tensor) -> Tensor:
        return 2 * x

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(2 * x.numpy() + 10)

    @use_kernelized_func(double)
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x) + 1

    x = torch.randn(3)
    with use_kernel_mapping(on_cpu(double=Double)):
        assert_same(compiled(Model())(x), 2 * x + 11)
        assert_same(compiled(lambda x: double(x=x))(x), 2 * x + 10)


@pytest.mark.parametrize("value", [3, 2.5, True, None, "text", torch.float64, (1, "text")])
@torch.no_grad()
def test_constant_argument_reaches_the_kernel(value: Any) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor, n: Any) -> Tensor:
            return x + 1

    class HubConstant(nn.Module):
        def forward(self, x: Tensor, n: Any) -> Tensor:
            assert n == value
            return torch.from_numpy(x.numpy() + 10)

    replace_kernel_forward_from_hub(Constant, "Constant")
    layer = Constant()
    with use_kernel_mapping(on_cpu(Constant=HubConstant)):
        made = compiled(lambda x: layer(x, value))(torch.ones(3))
        assert made.tolist() == [11] * 3


@torch.no_grad()
def test_classes_tagged_by_others_before_and_after_are_captured() -> None:
    class Early(nn.Module):
        kernel_layer_name = "Scale"

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift, self.eps = nn.Parameter(torch.ones(4)), torch.ones(4), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.shift + self.eps

    x = torch.randn(3, 4)
    early = nn.Sequential(Early())
    with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
        assert_same(compiled(early)(x), early(x) + 20)

    class Late(Early):
        kernel_layer_name = "Scale"

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.shift + self.eps

    late = nn.Sequential(Late())
    with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
        assert_same(compiled(late)(x), late(x) + 20)


@torch.no_grad()
def test_subclass_is_captured_unless_it_overrides_forward() -> None:
    class Inherits(Scale):
        pass

    class Overrides(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    x = torch.randn(3, 4)
    for cls, extra in ((Inherits, 10), (Overrides, 0)):
        model = nn.Sequential(cls())
        assert_same(compiled(model)(x), model(x) + extra)


@torch.no_grad()
def test_adopted_class_changes_no_other_forward() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Over(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    class Named(Plain):
        pass

    class Both(Named, Over):
        pass

    replace_kernel_forward_from_hub(Named, "Scale")
    x = torch.ones(2)
    assert Both()(x).tolist() == [-1, -1]
    compiled(Both())(x)
    assert Both()(x).tolist() == [-1, -1]
    assert Named()(x).tolist() == [1, 1]


@torch.no_grad()
def test_condition_is_asked_of_each_instance() -> None:
    @use_kernel_forward_from_hub("Scale", condition=lambda layer: layer.wanted)
    class Picky(Scale):
        wanted = True

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.shift + self.eps

    model, x = nn.Sequential(Picky(), Picky()), torch.randn(3, 4)
    model[1].wanted = False
    assert_same(compiled(model)(x), model[1](model[0](x) + 10))
    report = last_report()
    assert report is not None
    assert [d.reason for d in report.decisions] == [Reason.KERNEL, Reason.CONDITION]


@torch.no_grad()
def test_forward_of_an_instance_is_left_alone() -> None:
    model, x = Chain(), torch.randn(3, 4)
    layer = model.layers[0]
    layer.forward = lambda x: type(layer).forward(layer, x) + 100
    expected = model.layers[2](model.layers[1](layer(x))) + 10
    assert_same(compiled(model)(x), expected)
    report = last_report()
    assert report is not None
    assert [d.reason for d in report.decisions] == [Reason.OWN_FORWARD, Reason.KERNEL]


@torch.no_grad()
def test_layer_within_a_layer_is_captured_unless_the_outer_one_is() -> None:
    @use_kernel_forward_from_hub("Outer")
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    class HubOuter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1000

    model, x = Outer(), torch.randn(3, 4)
    reference = model.inner(x)
    assert_same(compiled(model)(x), reference + 11)
    torch.compiler.reset()
    with use_kernel_mapping(on_cpu(Outer=HubOuter)):
        assert_same(compiled(model)(x), reference + 1000)


@torch.no_grad()
def test_layer_without_a_kernel_for_the_device_keeps_its_reference() -> None:
    with use_kernel_mapping({"Scale": {"cuda": Repository(OpaqueScale)}}, False):
        model, x = Chain(), torch.randn(3, 4)
        assert_same(compiled(model)(x), model(x))
    report = last_report()
    assert report is not None
    assert {d.reason for d in report.decisions} == {Reason.NO_DEVICE}
    assert "cuda" in str(report)


@torch.no_grad()
def test_environment_variable_disables_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
    model, x = Chain(), torch.randn(3, 4)
    assert_same(compiled(model)(x), model(x))


def test_parameter_may_have_the_name_of_a_variable_of_the_wrapper():
    """The wrapper has variables called `module` and `read`."""

    @use_kernel_forward_from_hub("Named")
    class Named(nn.Module):
        def forward(self, x: Tensor, module: Tensor, read: float = 1.0) -> Tensor:
            return x * module * read

    class Kernel(nn.Module):
        def forward(self, x: Tensor, module: Tensor, read: float = 1.0) -> Tensor:
            return x * module * read + 10

    layer, x = Named(), torch.ones(3)
    assert torch.equal(layer(x, module=2 * x, read=3.0), 6 * x)
    with use_kernel_mapping({"Named": {"cpu": Repository(Kernel)}}), torch.no_grad():
        compiled = torch.compile(
            layer, backend="hubkernels", fullgraph=True, options={"inner": "eager"}
        )
        assert torch.equal(compiled(x, module=2 * x, read=3.0), 16 * x)


# --- the values of a layer ----------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_changed_attribute_is_followed(inner: str) -> None:
    model, x = Chain(), torch.randn(3, 4)
    f = compiled(model, inner)
    assert_same(f(x), by_hand(model, x))
    layer = model.layers[2]
    for name, value in [
        ("eps", 0.5),
        ("eps", 0.75),
        ("negate", True),
        ("power", "square"),
        ("weight", nn.Parameter(torch.full((4,), 3.0))),
        ("shift", torch.full((4,), -2.0)),
    ]:
        setattr(layer, name, value)
        expected = OpaqueScale.forward(layer, model.layers[1](model.layers[0](x) + 10))
        assert_same(f(x), expected)
    layer.weight.mul_(2)
    layer.shift.add_(1)
    expected = OpaqueScale.forward(layer, model.layers[1](model.layers[0](x) + 10))
    assert_same(f(x), expected)


@torch.no_grad()
def test_weights_are_freed_with_the_model() -> None:
    import gc
    import weakref

    model = Chain()
    compiled(model)(torch.randn(3, 4))
    weight = weakref.ref(model.layers[0].weight)
    torch.compiler.reset()
    del model
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_copy_runs_on_its_own_weights() -> None:
    model, x = Chain(), torch.randn(3, 4)
    compiled(model)(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.layers[0].weight.add_(1)
    assert_same(compiled(twin)(x), by_hand(twin, x))
    assert_same(compiled(model)(x), by_hand(model, x))
