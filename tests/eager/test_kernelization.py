from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kernelgraph
from kernelgraph import (
    CUDAProperties,
    Device,
    KernelizeFallback,
    Mode,
    kernelize,
    last_report,
    register_kernel_mapping,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernelgraph.eager.kernelization import KernelForward
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
    only,
    result,
)

INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


def kernelized(**layers: Any) -> Scale:
    """A `Scale` by 2, kernelized with ``layers`` as the mapping."""
    with only(**layers):
        return kernelize(Scale(2.0), mode=INFERENCE)


def reasons() -> list[Reason]:
    return [decision.reason for decision in last_report().decisions]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="kernelgraph")
    return lambda: caplog.messages


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="kernelgraph")
    return lambda: caplog.messages


# --- in place, again and again -------------------------------------------------------------------


class TestKernelize:
    def test_changes_the_model_in_place_and_returns_it(self) -> None:
        model = nn.Sequential(Scale(2.0), Plain(), nn.Sequential(Scale(3.0)))
        with only(Scale=Plus10):
            assert kernelize(model, mode=INFERENCE) is model
        assert list(forwards(model)) == ["0", "2.0"]
        assert result(model[0]) == 12
        assert result(model[2]) == 13

    def test_the_model_may_be_the_layer(self) -> None:
        assert result(kernelized(Scale=Plus10)) == 12

    def test_holds_outside_the_scope_it_was_done_in(self) -> None:
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

    def test_another_mode_or_device_does(self) -> None:
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
                with torch.no_grad():  # what is 20 off would not train anything
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

    def test_hooks_still_run(self) -> None:
        layer = kernelized(Scale=Plus10)
        layer.register_forward_hook(lambda module, args, output: output + 100)
        assert result(layer) == 112

    def test_leaves_state_and_signature_alone(self) -> None:
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
        model(torch.tensor(1.0))  # the first call compares them with the reference's
        calls.clear()
        output = model(torch.tensor(1.0))
        assert output == 3 * 2
        output.backward()
        assert calls == ["forward", "forward", "backward", "backward"]
        assert [p.grad.item() for p in model.parameters()] == [3, 2]
        optimizer.step()
        assert model(torch.tensor(1.0)) == (3 - 1) * (2 - 1.5)

    def test_what_is_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"^kernelize changes an nn.Module, not <class"):
            kernelize(nn.Linear, mode=INFERENCE)

    @pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)])
    def test_modes_that_are_none_to_kernelize_for(self, mode: Mode) -> None:
        with pytest.raises(ValueError, match=r"mode must contain INFERENCE or TRAINING"):
            kernelize(Plain(), mode=mode, device="cpu")

    def test_what_is_no_mode(self) -> None:
        with pytest.raises(TypeError, match=r"expected a kernelgraph Mode, got 'inference'"):
            kernelize(Plain(), mode="inference", device="cpu")


class TestCondition:
    def test_is_asked_for_each_instance(self) -> None:
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

    def test_what_it_refuses_is_neither_loaded_nor_an_error(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: False)
        class Refused(Scale):
            pass

        with only(Scale=BrokenRepository()):
            assert result(kernelize(Refused(), mode=INFERENCE, use_fallback=False)) == 1
        with only():
            assert result(kernelize(Refused(), mode=INFERENCE, use_fallback=False)) == 1

    def test_its_error_changes_nothing(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: 1 / 0)
        class Raises(Scale):
            pass

        model = nn.Sequential(Scale(), Raises())
        with only(Scale=Plus10), pytest.raises(ZeroDivisionError):
            kernelize(model, mode=INFERENCE)
        assert forwards(model) == {}


class TestOwnForward:
    def test_is_left_alone_with_a_word_in_the_log(self, records: Callable[[], list[str]]) -> None:
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

    def test_put_around_a_kernel_is_left_alone(self) -> None:
        # As accelerate's hooks do: a partial that keeps the forward it found, to give it back.
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


# --- when no kernel fits -------------------------------------------------------------------------

CUDA_90 = Device("cuda", CUDAProperties(90, 90))
TOY = ToyRepository(Plus10)

CASES = {
    KernelizeFallback.NO_LAYER: (
        {"Other": {"cpu": TOY}},
        "cpu",
        INFERENCE,
        "no kernel is registered under the layer's name (registered layers: Other, Shift)",
    ),
    KernelizeFallback.NO_DEVICE: (
        {"Scale": {"npu": TOY, CUDA_90: TOY}},
        "cpu",
        INFERENCE,
        "no kernel is registered for the device type (registered for: npu, cuda 90)",
    ),
    KernelizeFallback.NO_COMPATIBLE_PROPERTIES: (
        {"Scale": {CUDA_90: TOY}},
        Device("cuda", CUDAProperties(86, 86)),
        INFERENCE,
        "no registered capability interval contains the device's capability "
        "(registered for: cuda 90)",
    ),
    KernelizeFallback.NO_COMPATIBLE_MODE: (
        {"Scale": {"cpu": {INFERENCE: TOY}}},
        "cpu",
        TRAINING,
        "no kernel is registered for the mode (registered modes: INFERENCE)",
    ),
    KernelizeFallback.CANNOT_LOAD: (
        {"Scale": {"cpu": BrokenRepository()}},
        "cpu",
        INFERENCE,
        "the kernel could not be loaded (toy repository out of reach)",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestFallback:
    def model(self) -> nn.Module:
        """The first layer has a kernel, one that is loaded, and the last has one already."""
        with only(Scale=Plus20):
            layer = kernelize(Scale(), mode=INFERENCE)
        return nn.ModuleDict({"shift": Shift(), "inner": nn.ModuleList([layer])})

    def kernelize(self, model: nn.Module, case: KernelizeFallback, allowed: Any) -> None:
        mapping, device, mode, _ = CASES[case]
        shift = {"Shift": {d: ToyRepository(Shift10) for d in ("cpu", "cuda")}}
        with only({**mapping, **shift}):
            kernelize(model, mode=mode, device=device, use_fallback=allowed)

    def test_the_reference_is_kept_where_it_is_allowed(self, case: KernelizeFallback) -> None:
        for allowed in (case, KernelizeFallback.ALL):
            model = self.model()
            self.kernelize(model, case, allowed)
            assert result(model["inner"][0]) == 1
            assert list(forwards(model)) == ["shift"]
            assert last_report().decisions[1].detail in CASES[case][3]

    def test_elsewhere_it_is_an_error_that_changes_nothing(self, case: KernelizeFallback) -> None:
        others = KernelizeFallback(KernelizeFallback.ALL.value - case.value)
        for allowed in (False, KernelizeFallback.NONE, others):
            model, report = self.model(), last_report()
            before = forwards(model)
            if case is KernelizeFallback.CANNOT_LOAD:
                with pytest.raises(OSError, match=r"^toy repository out of reach$"):
                    self.kernelize(model, case, allowed)
            else:
                _, device, mode, why = CASES[case]
                shown = "cuda 86" if isinstance(device, Device) else device
                with pytest.raises(ValueError) as error:  # noqa: PT011
                    self.kernelize(model, case, allowed)
                assert str(error.value) == (
                    f"layer 'Scale' at inner.0: no kernel for device {shown} in mode {mode}, and "
                    f"use_fallback does not allow the reference: {why}"
                )
            assert forwards(model) == before
            assert last_report() is report

    def test_it_is_kept_by_default_unless_loading_fails(self, case: KernelizeFallback) -> None:
        model = self.model()
        if case is KernelizeFallback.CANNOT_LOAD:
            with pytest.raises(OSError, match=r"out of reach"):
                self.kernelize(model, case, True)
        else:
            self.kernelize(model, case, True)
            assert result(model["inner"][0]) == 1


def test_an_error_names_the_model_where_it_is_the_layer() -> None:
    with only(), pytest.raises(ValueError, match=r"^layer 'Scale' at \(model\): no kernel"):
        kernelize(Scale(), mode=INFERENCE, use_fallback=False)


@pytest.mark.parametrize("use_fallback", [None, 1, "ALL"])
def test_what_is_no_fallback(use_fallback: Any) -> None:
    with pytest.raises(TypeError, match=r"^use_fallback is a bool or a KernelizeFallback, not "):
        kernelize(Scale(), mode=INFERENCE, use_fallback=use_fallback)


class TestBackward:
    def test_a_kernel_without_one_serves_inference_alone(self) -> None:
        layer = Scale()
        with only(Scale=NoBackward):
            assert result(kernelize(layer, mode=INFERENCE)) == 31
            assert result(kernelize(layer, mode=TRAINING)) == 1
            assert reasons() == [Reason.NO_BACKWARD]
            with pytest.raises(
                ValueError,
                match=r"reference: the kernel has no backward \(toy repository of NoBackward\)$",
            ):
                kernelize(layer, mode=TRAINING, use_fallback=False)

    def test_absent_means_that_there_is_one(self) -> None:
        with only(Scale=Plus10), torch.no_grad():
            assert result(kernelize(Scale(), mode=TRAINING)) == 11


class TestRegisteredForAnUnsupportedMode:
    @pytest.mark.parametrize("asked", [INFERENCE, TRAINING])
    @pytest.mark.parametrize("registered", [TRAINING, TRAINING | Mode.TORCH_COMPILE])
    def test_training_without_a_backward(self, asked: Mode, registered: Mode) -> None:
        mapping = {"Scale": {"cpu": {registered: ToyRepository(NoBackward)}}}
        layer = Scale()
        with (
            only(mapping),
            pytest.raises(
                ValueError,
                match=rf"^toy repository of NoBackward is registered for mode "
                rf"{str(registered).replace('|', '.')}, but its layer NoBackward says "
                "has_backward = False: register it for another mode$",
            ),
        ):
            kernelize(layer, mode=asked, use_fallback=KernelizeFallback.ALL)
        assert forwards(layer) == {}

    @pytest.mark.parametrize("mode", [INFERENCE, TRAINING])
    def test_compiling_where_the_kernel_refuses_it(self, mode: Mode) -> None:
        refuses = type("Refuses", (Plus10,), {"can_torch_compile": False})
        mapping = {"Scale": {"cpu": {mode | Mode.TORCH_COMPILE: ToyRepository(refuses)}}}
        with (
            only(mapping),
            pytest.raises(ValueError, match=r"layer Refuses says can_torch_compile"),
        ):
            kernelize(Scale(), mode=mode)

    def test_eager_does_not_ask_whether_a_kernel_can_be_compiled(self) -> None:
        refuses = type("Refuses", (Plus10,), {"can_torch_compile": False})
        assert result(kernelized(Scale=refuses)) == 12


class TestUnfit:
    def test_an_impure_kernel(self) -> None:
        impure = type("Impure", (Plus10,), {"eps": 1})
        with pytest.raises(
            TypeError, match=r"^toy repository of Impure: hub layer Impure has memb"
        ):
            kernelized(Scale=impure)

    def test_a_kernel_with_another_signature_changes_nothing(self) -> None:
        class Other(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x

        model = nn.Sequential(Shift(), Scale())
        with (
            only(Scale=Other, Shift=Shift10),
            pytest.raises(
                TypeError,
                match=r"^toy repository of Other: forward of hub layer Other takes \(self, x: "
                r"'Tensor', y: 'Tensor'\) -> 'Tensor', and the layer that it would replace takes",
            ),
        ):
            kernelize(model, mode=INFERENCE, use_fallback=KernelizeFallback.ALL)
        assert forwards(model) == {}

    def test_it_is_checked_each_time(self) -> None:
        # Against each class: one name may be carried by classes whose forwards differ.
        @use_kernel_forward_from_hub("Scale")
        class Wide(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x

        with only(Scale=Plus10), pytest.raises(TypeError, match=r"differ in number or kind"):
            kernelize(nn.Sequential(Scale(), Wide()), mode=INFERENCE)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_disable_kernel_mapping(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    layer = kernelized(Scale=Plus10)
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", value)
    with only(Scale=BrokenRepository()):
        assert result(kernelize(layer, mode=INFERENCE, use_fallback=False)) == 2
    assert reasons() == [Reason.DISABLED]
    monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "0")
    with only(Scale=Plus10):
        assert result(kernelize(layer, mode=INFERENCE)) == 12


# --- the device ----------------------------------------------------------------------------------


class TestDevice:
    def device_for(self, model: nn.Module, device: Any = None) -> str:
        with only():
            kernelize(nn.ModuleList([Shift(), model]), mode=INFERENCE, device=device)
        return last_report().decisions[0].device

    def test_is_the_one_asked_for(self) -> None:
        for device in ("npu", Device("npu")):
            assert self.device_for(Scale(), device) == "npu"
        assert self.device_for(Scale(), torch.device("xpu:1")) == "xpu"
        assert self.device_for(Scale(), "metal") == "mps"

    def test_is_that_of_the_first_parameter_then_of_the_first_buffer(self) -> None:
        buffered = Plain()
        buffered.register_buffer("first", torch.ones(1))
        assert self.device_for(buffered) == "cpu"
        buffered.register_buffer("first", torch.ones(1, device="meta"))
        buffered.register_parameter("second", nn.Parameter(torch.ones(1)))
        assert self.device_for(buffered) == "cpu"

    def test_that_nothing_tells(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"^the model has neither parameters nor buffers to tell its device by: "
            r"pass device$",
        ):
            self.device_for(Plain())
        assert self.device_for(Plain(), "cpu") == "cpu"

    def test_that_no_kernel_is_for(self) -> None:
        with pytest.raises(
            ValueError, match=r'^the model is on meta: pass device \(unknown device type "meta"'
        ):
            self.device_for(Scale().to("meta"))

    def test_that_there_is_none_of(self) -> None:
        with pytest.raises(ValueError, match=r'^unknown device type "gpu": there are cpu, cuda, '):
            self.device_for(Scale(), "gpu")
        with pytest.raises(TypeError, match=r"device: expected a str, .* got int"):
            self.device_for(Scale(), 0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
    @pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
    def test_cuda_on_a_machine_without_it(self, device: Any) -> None:
        mapping = {"Scale": {"cuda": TOY}, "Shift": {CUDA_90: ToyRepository(Shift10)}}
        model = nn.ModuleList([Scale(), Shift()])
        with only(mapping):
            kernelize(model, mode=INFERENCE, device=device)
        assert [result(layer) for layer in model] == [11, 2]
        assert "capability is unknown" in last_report().decisions[1].detail

    def test_its_capability_chooses_the_kernel(self) -> None:
        for capability, expected in [(80, 1), (89, 11), (90, 21)]:
            mapping = {
                Device("cuda", CUDAProperties(86, 99)): TOY,
                CUDA_90: ToyRepository(Plus20),
            }
            device = Device("cuda", CUDAProperties(capability, capability))
            with only({"Scale": mapping}):
                assert result(kernelize(Scale(), mode=INFERENCE, device=device)) == expected


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


def test_the_report() -> None:
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


# --- copies and pickles --------------------------------------------------------------------------


class TestCopy:
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_deep_copy_runs_the_kernel_on_its_own_weights(self, nested: bool) -> None:
        original: Any = nn.Sequential(kernelized(Scale=Plus10)) if nested else kernelized(Scale=TOY)
        twin = copy.deepcopy(original)
        with torch.no_grad():
            next(twin.parameters()).fill_(3)
            assert (result(original), result(twin)) == (12, 13)
            next(original.parameters()).fill_(4)
            assert (result(original), result(twin)) == (14, 13)

    def test_a_deep_copy_of_a_copy_is_kernelized_anew_alone(self) -> None:
        original = kernelized(Scale=Plus10)
        twin = copy.deepcopy(copy.deepcopy(original))
        with only(Scale=Plus20):
            kernelize(twin, mode=INFERENCE)
        assert (result(original), result(twin)) == (12, 22)

    def test_a_deep_copy_loads_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = kernelized(Scale=Flaky(Plus10))
        monkeypatch.setattr(Flaky, "broken", True)
        assert result(copy.deepcopy(original)) == 12

    def test_a_deep_copy_of_the_forward_is_one_of_its_layer(self) -> None:
        forward = copy.deepcopy(kernelized(Scale=Plus10).forward)
        assert isinstance(forward, KernelForward)
        assert vars(forward.args[0])["forward"] is not None
        assert result(forward) == 12

    def test_a_shallow_copy_runs_on_the_original_until_it_is_kernelized(self) -> None:
        original = kernelized(Scale=Plus10)
        shallow = copy.copy(original)
        shallow.__dict__["_parameters"] = {"weight": nn.Parameter(torch.tensor(7.0))}
        assert result(shallow) == 12
        with only(Scale=Plus10):
            kernelize(shallow, mode=INFERENCE)
        assert (result(original), result(shallow)) == (12, 17)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Untagged(nn.Module):
    """Made extensible by a test, and pickled with its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flaky(ToyRepository):
    """A repository that a test can break."""

    broken = False

    def load(self) -> Any:
        if Flaky.broken:
            raise OSError("out of reach")
        return super().load()


class TestPickle:
    @pytest.mark.parametrize("through", [through_pickle, through_torch])
    def test_the_kernel_is_in_use_on_the_loaded_weights(self, through: Any) -> None:
        original = nn.Sequential(kernelized(Scale=Plus10), Plain())
        with only(Scale=Plus20):  # what is registered where it is loaded does not matter
            loaded = through(original)
        assert result(loaded) == 12
        with torch.no_grad():
            loaded[0].weight.fill_(3)
        assert (result(original), result(loaded)) == (12, 13)
        assert list(loaded.state_dict()) == ["0.weight"]
        loaded.load_state_dict(original.state_dict())
        assert result(loaded) == 12
        assert result(through(copy.deepcopy(loaded))) == 12

    def test_loads_each_kernel_once(self) -> None:
        repository = ToyRepository(Plus10)
        with only(Scale=repository):
            model = kernelize(nn.Sequential(*(Scale() for _ in range(5))), mode=INFERENCE)
        loaded = through_pickle(model)
        (seen,) = {id(m.forward.recipe.selection.repository): m.forward for m in loaded}.values()
        # One load before it was pickled, which travelled with the toy, and one after.
        assert len(seen.recipe.selection.repository.loads) == 2

    def test_the_forward_itself_can_be_pickled(self) -> None:
        forward = pickle.loads(pickle.dumps(kernelized(Scale=Plus10).forward))
        assert result(forward) == 12

    def test_what_was_unpickled_is_decided_anew(self) -> None:
        loaded = through_pickle(kernelized(Scale=Plus10))
        with only(Scale=Plus20):
            assert result(kernelize(loaded, mode=INFERENCE)) == 22
        with only():
            assert result(kernelize(loaded, mode=INFERENCE)) == 2
        assert forwards(loaded) == {}

    def test_comes_back_with_references_where_the_kernel_cannot_be_loaded(
        self, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
    ) -> None:
        with only(Scale=Flaky(Plus10)):
            model = kernelize(nn.Sequential(Scale(2.0), Scale(3.0)), mode=INFERENCE)
        saved = pickle.dumps(model)
        monkeypatch.setattr(Flaky, "broken", True)
        loaded = pickle.loads(saved)
        assert [result(layer) for layer in loaded] == [2, 3]
        assert warnings() == ["unpickled layers Scale run their reference: OSError: out of reach"]
        # Nothing is lost: the kernel is back once it can be had again.
        again = pickle.dumps(loaded)
        monkeypatch.setattr(Flaky, "broken", False)
        assert [result(layer) for layer in pickle.loads(again)] == [12, 13]
        with only(Scale=Plus20):
            kernelize(loaded, mode=INFERENCE)
        assert [result(layer) for layer in loaded] == [22, 23]

    def test_comes_back_with_references_where_kernels_are_disabled(
        self, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
    ) -> None:
        saved = pickle.dumps(kernelized(Scale=Plus10))
        monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
        assert result(pickle.loads(saved)) == 2
        assert warnings() == [
            "unpickled layers Scale run their reference: DISABLE_KERNEL_MAPPING is set"
        ]

    def test_comes_back_with_references_where_the_class_is_not_extensible(
        self, warnings: Callable[[], list[str]]
    ) -> None:
        replace_kernel_forward_from_hub(Untagged, "Shift")
        try:
            with only(Shift=Shift10):
                saved = pickle.dumps(kernelize(Untagged(), mode=INFERENCE, device="cpu"))
            assert result(pickle.loads(saved)) == 11
        finally:
            del Untagged.kernel_layer_name
        assert result(pickle.loads(saved)) == 1
        assert warnings() == [
            "unpickled layers Untagged run their reference: "
            "TypeError: the class is not extensible in this process"
        ]


# --- threads -------------------------------------------------------------------------------------


def test_the_mapping_may_change_while_a_model_is_kernelized() -> None:
    """Each model is kernelized with one mapping or the other, and never with parts of both."""
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
    before = kernelgraph.selection.mapping.current_mapping()
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
        kernelgraph.selection.mapping._process_mapping = before
    assert seen <= {(11, 11, 11, 11), (21, 2, 21, 2)}


# --- imports -------------------------------------------------------------------------------------


def test_eager_use_imports_no_compiler() -> None:
    program = """
import sys
import torch
from tests.support.toys import Plus10, Scale, only, result
from kernelgraph import Mode, kernelize
with only(Scale=Plus10):
    model = kernelize(torch.nn.Sequential(Scale(2.0)), mode=Mode.TRAINING)
with torch.no_grad():
    assert result(model) == 12
print([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor"))])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# --- any tree of modules -------------------------------------------------------------------------


class Leaf(nn.Module):
    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def forward(self, x: Tensor) -> Tensor:
        return x


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
        return x


class HubTen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 10


class HubTwenty(nn.Module):
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x + 20


# What the rules say of each class: its name, whether it is choosy, and what its reference adds.
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
    """What ``module`` adds to its input after kernelize, by the rules for people."""
    name, choosy, reference = ORACLE[type(module)]
    if vars(module).get("forward") is own_forward:
        return 1000
    if name is None or (choosy and not module.wanted):
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
    """Every module in ``module`` that is in the oracle, itself included, repeated where shared."""
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
