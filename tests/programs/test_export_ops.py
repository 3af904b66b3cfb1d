"""The ops that `kernelgraph.export` makes: what they compute, write, return and depend on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import Mode, export, kernelize, last_report, use_kernel_forward_from_hub
from tests.support.exporting import BOTH, INFERENCE, TRAINING, kernelized, ops
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale
from tests.support.toys import only

# --- calls that do more than return a tensor -----------------------------------------------------


@use_kernel_forward_from_hub("Counted")
class Counted(nn.Module):
    """Counts its calls in a buffer, and returns several results in a dict."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, by: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        return {"half": x / 2, "rest": [x * by, None]}


class OpaqueCounted(nn.Module):
    def forward(self, x: Tensor, by: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        return {"half": torch.from_numpy(x.numpy() / 2), "rest": [x * by + 10, None]}


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def forward(self, x: Tensor) -> Any:
        made = self.counted(x, by=3.0)
        return made["half"] + 1, self.counted(x)["rest"][0]


@BOTH
def test_program_writes_the_buffer_that_the_layer_writes(strict):
    x = (torch.randn(3, 4),)
    with only(Counted=OpaqueCounted):
        program = export(Counts().eval(), x, mode=INFERENCE, strict=strict)
    module = program.module()
    for _ in range(2):
        half, rest = module(*x)
        torch.testing.assert_close(half, x[0] / 2 + 1)
        torch.testing.assert_close(rest, x[0] + 10)
    assert dict(module.named_buffers())["counted.calls"].item() == 4


@BOTH
def test_op_runs_in_the_autocast_region_around_its_layer(strict):
    class Product(nn.Module):
        kernel_layer_name = "Product"

        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    class OpaqueProduct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy()) @ x + 10

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = Product()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.product(x)

    model, x = Cast().eval(), (torch.randn(4, 4),)
    with only(Product=OpaqueProduct), torch.no_grad():
        program = export(model, x, mode=INFERENCE, strict=strict)
        assert program.module()(*x).dtype is torch.bfloat16
        torch.testing.assert_close(program.module()(*x), kernelized(model, x))
    assert len(ops(program)) == 1


@BOTH
def test_op_returns_sizes_that_depend_on_values(strict):
    def sizes(self: nn.Module, x: Tensor) -> Tensor:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size())

    @use_kernel_forward_from_hub("Positive", fake=sizes)
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0]

    class OpaquePositive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy()[x.numpy() > 0]) + 10

    model = nn.Sequential(Positive(), nn.ReLU())
    with only(Positive=OpaquePositive):
        program = export(model, (torch.randn(8),), mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    x = torch.tensor([1.0, -1, 2, -2, 3, 4, -5, 6])
    torch.testing.assert_close(program.module()(x), x[x > 0] + 10)


# --- the model's code ---------------------------------------------------------------------------


class Helped(Scale):
    kernel_layer_name = "Scale"

    def helper(self, x: Tensor) -> Tensor:
        return x + self.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x) * self.weight


class UsesHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x) * 2


@BOTH
def test_kernel_that_calls_the_models_code_keeps_the_reference(strict):
    with only(Scale=UsesHelper):
        program = export(
            nn.Sequential(Helped()), (torch.randn(3, 4),), mode=INFERENCE, strict=strict
        )
    assert ops(program) == []
    report = last_report()
    assert report is not None
    assert "the kernel uses self.helper, which is code of the model's" in report.decisions[0].detail


@BOTH
def test_layer_may_use_code_that_its_kernel_does_not_need(strict):
    """Only the kernel runs where the program is loaded, and not the layer's own forward."""

    class Activated(Scale):
        kernel_layer_name = "Scale"

        def __init__(self) -> None:
            super().__init__()
            self.act = kernelized_relu

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * self.weight

    with only(Scale=OpaqueScale):
        program = export(
            nn.Sequential(Activated()), (torch.randn(3, 4),), mode=INFERENCE, strict=strict
        )
    assert len(ops(program)) == 1


def kernelized_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@BOTH
def test_kernel_sees_the_torch_modules_and_constants_of_its_layer(strict):
    class Act(nn.Module):
        kernel_layer_name = "Act"

        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU()
            self.sizes = {"a": (1, 2.5), "b": [torch.float32]}

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * self.sizes["a"][1]

    class OpaqueAct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(torch.from_numpy(x.numpy()))
            return (y * self.sizes["a"][1]).to(self.sizes["b"][0]) + 10

    model, x = nn.Sequential(Act()), (torch.randn(3, 4),)
    with only(Act=OpaqueAct):
        program = export(model, x, mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(*x), model(*x) + 10)


# --- training -----------------------------------------------------------------------------------


@BOTH
def test_program_for_training_has_the_gradient_of_the_reference(strict):
    model, x = Chain(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(model, (x,), mode=TRAINING, strict=strict)
        mode = TRAINING | Mode.TORCH_COMPILE
        eager = kernelize(copy.deepcopy(model), mode=mode, verify_gradients=False)
        compiled = torch.compile(eager, backend="aot_eager")
        module = program.module()
        found = []
        for run in (module, compiled):
            inputs = x.clone().requires_grad_()
            run(inputs).square().sum().backward()
            found.append([inputs.grad, *(p.grad for _, p in sorted(run.named_parameters()))])
    assert len(ops(program)) == 2
    assert all(name.endswith("_training") for name in ops(program))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert all(g is not None and g.abs().sum() > 0 for g in found[0])


def test_layer_that_cannot_be_traced_is_not_exported_for_training():
    class Busy(Scale):
        kernel_layer_name = "Scale"

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum().item() > 0 else -x

    model = nn.Sequential(Busy())
    with only(Scale=TraceableScale):
        assert len(ops(export(model, (torch.randn(3, 4),), mode=INFERENCE))) == 1
        with pytest.raises(
            ValueError, match=r"own forward, which cannot be traced .*: export it for"
        ):
            export(model, (torch.randn(3, 4),), mode=TRAINING)


@BOTH
def test_error_in_a_kernel_names_kernel_layer_and_path(strict):
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"no {x.numpy().shape}")

    model = Chain()  # kept alive, since the error shows paths in models that still exist
    with only(Scale=Raises):
        program = export(model, (torch.randn(3, 4),), mode=INFERENCE, strict=strict)
    where = r"kernel tests@\w+: Raises, called for layer Scale at (one of )?layers\.0"
    with pytest.raises(RuntimeError, match=where):
        program.module()(torch.randn(3, 4))
