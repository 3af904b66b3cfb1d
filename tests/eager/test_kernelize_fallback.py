"""``kernelize`` where no kernel fits: fallbacks, errors, modes and devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import (
    CUDAProperties,
    Device,
    KernelizeFallback,
    Mode,
    kernelize,
    last_report,
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
        """A model whose first layer has a kernel in the mapping, and whose last runs on one."""
        with only(Scale=Plus20):
            layer = kernelize(Scale(), mode=INFERENCE)
        return nn.ModuleDict({"shift": Shift(), "inner": nn.ModuleList([layer])})

    def kernelize(self, model: nn.Module, case: KernelizeFallback, allowed: Any) -> None:
        mapping, device, mode, _ = CASES[case]
        shift = {"Shift": {d: ToyRepository(Shift10) for d in ("cpu", "cuda")}}
        with only({**mapping, **shift}):
            kernelize(model, mode=mode, device=device, use_fallback=allowed)

    def test_reference_is_kept_where_use_fallback_allows_it(self, case: KernelizeFallback) -> None:
        for allowed in (case, KernelizeFallback.ALL):
            model = self.model()
            self.kernelize(model, case, allowed)
            assert result(model["inner"][0]) == 1
            assert list(forwards(model)) == ["shift"]
            assert last_report().decisions[1].detail in CASES[case][3]

    def test_a_fallback_that_is_not_allowed_is_an_error_that_changes_nothing(
        self, case: KernelizeFallback
    ) -> None:
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

    def test_reference_is_kept_by_default_unless_loading_fails(
        self, case: KernelizeFallback
    ) -> None:
        model = self.model()
        if case is KernelizeFallback.CANNOT_LOAD:
            with pytest.raises(OSError, match=r"out of reach"):
                self.kernelize(model, case, True)
        else:
            self.kernelize(model, case, True)
            assert result(model["inner"][0]) == 1


def test_error_for_a_model_that_is_the_layer_says_so() -> None:
    with only(), pytest.raises(ValueError, match=r"^layer 'Scale' at \(model\): no kernel"):
        kernelize(Scale(), mode=INFERENCE, use_fallback=False)


@pytest.mark.parametrize("use_fallback", [None, 1, "ALL"])
def test_use_fallback_of_another_type_is_refused(use_fallback: Any) -> None:
    with pytest.raises(TypeError, match=r"^use_fallback is a bool or a KernelizeFallback, not "):
        kernelize(Scale(), mode=INFERENCE, use_fallback=use_fallback)


class TestBackward:
    def test_a_kernel_without_a_backward_is_used_for_inference_only(self) -> None:
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

    def test_a_kernel_that_does_not_say_has_a_backward(self) -> None:
        with only(Scale=Plus10), torch.no_grad():
            assert result(kernelize(Scale(), mode=TRAINING)) == 11


class TestRegisteredForAnUnsupportedMode:
    @pytest.mark.parametrize("asked", [INFERENCE, TRAINING])
    @pytest.mark.parametrize("registered", [TRAINING, TRAINING | Mode.TORCH_COMPILE])
    def test_a_kernel_without_a_backward_registered_for_training_is_refused(
        self, asked: Mode, registered: Mode
    ) -> None:
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
    def test_a_kernel_that_cannot_compile_registered_for_compiling_is_refused(
        self, mode: Mode
    ) -> None:
        refuses = type("Refuses", (Plus10,), {"can_torch_compile": False})
        mapping = {"Scale": {"cpu": {mode | Mode.TORCH_COMPILE: ToyRepository(refuses)}}}
        with (
            only(mapping),
            pytest.raises(ValueError, match=r"layer Refuses says can_torch_compile"),
        ):
            kernelize(Scale(), mode=mode)

    def test_a_kernel_that_cannot_compile_is_used_in_eager(self) -> None:
        refuses = type("Refuses", (Plus10,), {"can_torch_compile": False})
        assert result(kernelized(Scale=refuses)) == 12


class TestUnfit:
    def test_an_impure_kernel_is_refused(self) -> None:
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

    def test_signature_is_checked_for_each_class(self) -> None:
        # For each class: classes whose forwards differ may have the same layer name.
        @use_kernel_forward_from_hub("Scale")
        class Wide(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x

        with only(Scale=Plus10), pytest.raises(TypeError, match=r"differ in number or kind"):
            kernelize(nn.Sequential(Scale(), Wide()), mode=INFERENCE)


# --- the device ----------------------------------------------------------------------------------


class TestDevice:
    def device_for(self, model: nn.Module, device: Any = None) -> str:
        with only():
            kernelize(nn.ModuleList([Shift(), model]), mode=INFERENCE, device=device)
        return last_report().decisions[0].device

    def test_device_is_the_one_passed(self) -> None:
        for device in ("npu", Device("npu")):
            assert self.device_for(Scale(), device) == "npu"
        assert self.device_for(Scale(), torch.device("xpu:1")) == "xpu"
        assert self.device_for(Scale(), "metal") == "mps"

    def test_device_defaults_to_the_first_parameter_then_the_first_buffer(self) -> None:
        buffered = Plain()
        buffered.register_buffer("first", torch.ones(1))
        assert self.device_for(buffered) == "cpu"
        buffered.register_buffer("first", torch.ones(1, device="meta"))
        buffered.register_parameter("second", nn.Parameter(torch.ones(1)))
        assert self.device_for(buffered) == "cpu"

    def test_a_model_without_tensors_needs_a_device(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"^the model has neither parameters nor buffers to tell its device by: "
            r"pass device$",
        ):
            self.device_for(Plain())
        assert self.device_for(Plain(), "cpu") == "cpu"

    def test_a_model_on_meta_needs_a_device(self) -> None:
        with pytest.raises(
            ValueError, match=r'^the model is on meta: pass device \(unknown device type "meta"'
        ):
            self.device_for(Scale().to("meta"))

    def test_an_unknown_device_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r'^unknown device type "gpu": there are cpu, cuda, '):
            self.device_for(Scale(), "gpu")
        with pytest.raises(TypeError, match=r"device: expected a str, .* got int"):
            self.device_for(Scale(), 0)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
    @pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
    def test_device_may_be_cuda_on_a_machine_without_it(self, device: Any) -> None:
        mapping = {"Scale": {"cuda": TOY}, "Shift": {CUDA_90: ToyRepository(Shift10)}}
        model = nn.ModuleList([Scale(), Shift()])
        with only(mapping):
            kernelize(model, mode=INFERENCE, device=device)
        assert [result(layer) for layer in model] == [11, 2]
        assert "capability is unknown" in last_report().decisions[1].detail

    def test_capability_of_the_device_selects_the_kernel(self) -> None:
        for capability, expected in [(80, 1), (89, 11), (90, 21)]:
            mapping = {
                Device("cuda", CUDAProperties(86, 99)): TOY,
                CUDA_90: ToyRepository(Plus20),
            }
            device = Device("cuda", CUDAProperties(capability, capability))
            with only({"Scale": mapping}):
                assert result(kernelize(Scale(), mode=INFERENCE, device=device)) == expected
