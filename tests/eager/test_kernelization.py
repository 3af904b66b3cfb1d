"""``kernelize``: which layers of a model it changes, and how."""

from __future__ import annotations

import copy
import functools
import itertools
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    register_kernel_mapping,
    use_kernel_forward_from_hub,
)
from kernelgraph.report import Reason
from tests.support.toys import (
    BrokenRepository,
    NoBackward,
    Plain,
    Plus10,
    Plus20,
    Scale,
    Shift,
    Shift10,
    ToyRepository,
    forwards,
    kernelized,
    only,
    reasons,
    result,
)

INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


# --- changes of the model ------------------------------------------------------------------------


class TestKernelize:
    def test_kernelize_changes_the_model_in_place_and_returns_it(self) -> None:
        model = nn.Sequential(Scale(2.0), Plain(), nn.Sequential(Scale(3.0)))
        with only(Scale=Plus10):
            assert kernelize(model, mode=INFERENCE) is model
        assert list(forwards(model)) == ["0", "2.0"]
        assert result(model[0]) == 12
        assert result(model[2]) == 13

    def test_the_model_may_itself_be_the_layer(self) -> None:
        assert result(kernelized(Scale=Plus10)) == 12

    def test_kernels_stay_outside_the_scope_of_the_mapping(self) -> None:
        layer = kernelized(Scale=Plus10)
        with only(Scale=Plus20):
            assert result(layer) == 12

    def test_another_mapping_decides_every_layer_anew(self) -> None:
        model = nn.Sequential(Scale(), Shift())
        with only(Scale=Plus10):
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [11, 2]
        with only(Scale=Plus20, Shift=Shift10):
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [21, 11]
        with only(Shift=Shift10):
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [1, 11]
        with only():
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [1, 2]
        assert forwards(model) == {}

    def test_another_mode_or_device_decides_every_layer_anew(self) -> None:
        mapping = {
            "Scale": {
                "cpu": {INFERENCE: ToyRepository(Plus10), TRAINING: ToyRepository(Plus20)},
                "npu": ToyRepository(NoBackward),
            }
        }
        layer = Scale()
        with only(mapping):
            for mode, device, expected in [
                (INFERENCE, None, 11),
                (TRAINING, None, 21),
                (INFERENCE, "npu", 31),
                (TRAINING, "npu", 1),
                (INFERENCE, "xpu", 1),
                (INFERENCE, "cpu", 11),
            ]:
                kernelize(layer, mode=mode, device=device)
                with torch.no_grad():  # with gradients a kernel that is 20 off would not be used
                    assert result(layer) == expected

    def test_a_shared_layer_is_decided_once(self) -> None:
        shared = Scale()
        with only(Scale=Plus10):
            kernelize(nn.Sequential(shared, shared), mode=INFERENCE)
        assert [d.path for d in last_report().decisions] == ["0"]

    def test_a_kernel_is_loaded_once_for_a_class(self) -> None:
        repository = ToyRepository(Plus10)
        with only(Scale=repository):
            kernelize(nn.Sequential(*(Scale() for _ in range(5))), mode=INFERENCE)
        assert len(repository.loads) == 1

    def test_a_subclass_that_inherits_forward_runs_the_kernel(self) -> None:
        class Inherits(Scale):
            pass

        class Overrides(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        model = nn.ModuleList([Inherits(), Overrides()])
        with only(Scale=Plus10):
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [11, 2]
        assert [d.path for d in last_report().decisions] == ["0"]

    def test_hooks_of_a_kernelized_layer_run(self) -> None:
        layer = kernelized(Scale=Plus10)
        layer.register_forward_hook(lambda module, args, output: output + 100)
        assert result(layer) == 112

    def test_state_dict_of_a_kernelized_layer_is_the_same(self) -> None:
        layer = kernelized(Scale=Plus10)
        assert list(layer.state_dict()) == ["weight"]
        layer.load_state_dict({"weight": torch.tensor(5.0)})
        assert result(layer) == 15

    def test_weights_may_be_converted_and_replaced_afterwards(self) -> None:
        layer = kernelized(Scale=Plus10)
        assert layer.to(torch.float64)(torch.ones((), dtype=torch.float64)).dtype == torch.float64
        layer.weight = nn.Parameter(torch.tensor(7.0))
        assert result(layer) == 17
        assert torch.func.functional_call(
            layer, {"weight": torch.tensor(4.0)}, torch.ones(())
        ) == torch.tensor(14.0)

    def test_gradients_flow_through_a_kernel(self) -> None:
        calls: list[str] = []

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                calls.append("forward")
                ctx.save_for_backward(x, weight)
                return x * weight

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
                calls.append("backward")
                x, weight = ctx.saved_tensors
                return grad * weight, grad * x

        class Kernel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Product.apply(x, self.weight)

        model = nn.Sequential(Scale(2.0), Scale(3.0))
        with only(Scale=Kernel):
            kernelize(model, mode=TRAINING)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.tensor(1.0))  # the first call also runs the kernel to compare its gradients
        calls.clear()
        output = model(torch.tensor(1.0))
        assert output == 3 * 2
        output.backward()
        assert calls == ["forward", "forward", "backward", "backward"]
        assert [p.grad.item() for p in model.parameters()] == [3, 2]
        optimizer.step()
        assert model(torch.tensor(1.0)) == (3 - 1) * (2 - 1.5)

    def test_a_model_that_is_no_module_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"^kernelize changes an nn.Module, not <class"):
            kernelize(nn.Linear, mode=INFERENCE)

    @pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)])
    def test_a_mode_without_inference_or_training_is_refused(self, mode: Mode) -> None:
        with pytest.raises(ValueError, match=r"mode must contain INFERENCE or TRAINING"):
            kernelize(Plain(), mode=mode, device="cpu")

    def test_a_mode_of_another_type_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"expected a kernelgraph Mode, got 'inference'"):
            kernelize(Plain(), mode="inference", device="cpu")


class TestCondition:
    def test_condition_is_checked_for_each_instance(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: layer.weight > 1)
        class Picky(Scale):
            pass

        model = nn.ModuleList([Picky(1.0), Picky(2.0)])
        with only(Scale=Plus10):
            kernelize(model, mode=INFERENCE)
            assert [result(layer) for layer in model] == [1, 12]
            assert reasons() == [Reason.CONDITION, Reason.KERNEL]
            with torch.no_grad():
                model[1].weight.fill_(0.5)
            kernelize(model, mode=INFERENCE)
        assert [result(layer) for layer in model] == [1, 0.5]
        assert forwards(model) == {}

    def test_kernel_of_a_refused_instance_is_neither_loaded_nor_missed(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: False)
        class Refused(Scale):
            pass

        with only(Scale=BrokenRepository()):
            assert result(kernelize(Refused(), mode=INFERENCE, use_fallback=False)) == 1
        with only():
            assert result(kernelize(Refused(), mode=INFERENCE, use_fallback=False)) == 1

    def test_an_error_in_a_condition_changes_nothing(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: 1 / 0)
        class Raises(Scale):
            pass

        model = nn.Sequential(Scale(), Raises())
        with only(Scale=Plus10), pytest.raises(ZeroDivisionError):
            kernelize(model, mode=INFERENCE)
        assert forwards(model) == {}


class TestOwnForward:
    def test_own_forward_is_left_alone_and_logged(self, records: Callable[[], list[str]]) -> None:
        model = nn.Sequential(Scale(), Scale())
        own = types.MethodType(lambda self, x: x + 1000, model[1])
        model[1].forward = own
        with only(Scale=Plus10):
            kernelize(model, mode=INFERENCE, use_fallback=False)
        assert result(model[0]) == 11
        assert model[1].forward is own
        assert records()[1] == (
            "kernelize: layer Scale at 1 for cpu, INFERENCE: "
            "reference: the instance has a forward of its own"
        )

    def test_own_forward_around_a_kernel_is_left_alone(self) -> None:
        # Like the hooks of accelerate: a partial that keeps the forward that it replaces.
        def with_hook(module: nn.Module, x: Tensor) -> Tensor:
            return module._old_forward(x) + 100

        layer = kernelized(Scale=Plus10)
        layer._old_forward = layer.forward
        layer.forward = functools.update_wrapper(
            functools.partial(with_hook, layer), layer._old_forward
        )
        with only(Scale=Plus20):
            kernelize(layer, mode=INFERENCE)
            assert result(layer) == 112
            assert reasons() == [Reason.OWN_FORWARD]
            twin = copy.deepcopy(layer)
            with torch.no_grad():
                twin.weight.fill_(5)
            assert (result(twin), result(layer)) == (115, 112)
            layer.forward = layer._old_forward
            assert result(layer) == 12
            kernelize(layer, mode=INFERENCE)
        assert result(layer) == 22


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_disable_kernel_mapping_keeps_every_reference(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    layer = kernelized(Scale=Plus10)
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", value)
    with only(Scale=BrokenRepository()):
        assert result(kernelize(layer, mode=INFERENCE, use_fallback=False)) == 2
    assert reasons() == [Reason.DISABLED]
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "0")
    with only(Scale=Plus10):
        assert result(kernelize(layer, mode=INFERENCE)) == 12


# --- log and report ------------------------------------------------------------------------------


def test_each_decision_is_logged(records: Callable[[], list[str]]) -> None:
    model = nn.Sequential(Scale(), nn.Sequential(Shift()))
    with only(Scale=Plus10):
        kernelize(model, mode=TRAINING)
    kernel = last_report().decisions[0].kernel
    assert kernel.startswith("tests@")
    assert kernel.endswith(": Plus10")
    assert records() == [
        f"kernelize: layer Scale at 0 for cpu, TRAINING: {kernel}",
        "kernelize: layer Shift at 1.0 for cpu, TRAINING: reference: no kernel is registered "
        "under the layer's name (registered layers: Scale)",
    ]


def test_each_decision_is_in_the_report() -> None:
    model = nn.Sequential(Scale(), nn.Sequential(Shift()))
    with only(Scale=Plus10):
        kernelize(model, mode=INFERENCE)
    report = last_report()
    scale, shift = report.decisions
    assert report.source == "kernelize"
    assert report.kernels == (scale,)
    assert (scale.path, scale.layer, scale.device, scale.mode) == ("0", "Scale", "cpu", "INFERENCE")
    assert (scale.reason, scale.detail, scale.op) == (Reason.KERNEL, "", "")
    assert (shift.path, shift.reason, shift.kernel) == ("1.0", Reason.NO_LAYER, "")
    assert shift.detail == "registered layers: Scale"


# --- threads -------------------------------------------------------------------------------------


def test_the_mapping_may_change_while_a_model_is_kernelized() -> None:
    """Each model is kernelized with one mapping or the other, never with parts of both."""
    mappings = [
        {"Scale": {"cpu": ToyRepository(Plus10)}, "Shift": {"cpu": ToyRepository(Shift10)}},
        {"Scale": {"cpu": ToyRepository(Plus20)}, "Other": {"cpu": ToyRepository(Plain)}},
    ]
    stop = threading.Event()

    def register() -> None:
        for mapping in itertools.cycle(mappings):
            if stop.is_set():
                return
            register_kernel_mapping(mapping, inherit_mapping=False)

    thread = threading.Thread(target=register)
    before = kernelgraph.selection.scopes.current_mapping()
    register_kernel_mapping(mappings[0], inherit_mapping=False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        seen = set()
        for _ in range(150):
            model = nn.ModuleList([Scale(), Shift(), Scale(), Shift()])
            kernelize(model, mode=INFERENCE)
            seen.add(tuple(result(layer) for layer in model))
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
        kernelgraph.selection.scopes._process_mapping = before
    assert seen <= {(11, 11, 11, 11), (21, 2, 21, 2)}


# --- imports -------------------------------------------------------------------------------------


def test_kernelize_imports_no_compiler() -> None:
    program = """
import sys
import torch
from tests.support.toys import Plus10, Scale, only
from kernelgraph import Mode, kernelize
with only(Scale=Plus10):
    kernelize(torch.nn.Sequential(Scale(2.0)), mode=Mode.TRAINING)
    kernelize(torch.nn.Sequential(Scale(2.0)), mode=Mode.INFERENCE)
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor"))])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
