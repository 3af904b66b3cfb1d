"""Objects of the ``kernels`` package work unchanged where ours are expected.

Each test runs with a stand-in for that package and, where it is installed, with the package.
"""

from __future__ import annotations

import copy
import enum
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import KernelizeFallback, Mode, kernelize, last_report, use_kernel_mapping
from kernelgraph.graph.lowering.options import Options
from kernelgraph.report import Reason
from kernelgraph.selection.devices import CUDAProperties, Device, ROCMProperties, Target, target_of
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.matching import Rejection, selections
from tests.support import other_package
from tests.support.other_package import write_kernel
from tests.support.toys import BrokenRepository, Plus10, Plus20, Scale, ToyRepository, only, result

MODES = [
    ("INFERENCE",),
    ("TRAINING",),
    ("INFERENCE", "TORCH_COMPILE"),
    ("TRAINING", "TORCH_COMPILE"),
    ("FALLBACK",),
]


def joined(cls: Any, names: tuple[str, ...]) -> Any:
    flag = cls[names[0]]
    for name in names[1:]:
        flag |= cls[name]
    return flag


class TestModes:
    @pytest.mark.parametrize("names", MODES, ids="|".join)
    def test_modes_stand_for_ours_by_their_names(self, theirs: Any, names: tuple[str, ...]) -> None:
        assert Mode.parse(joined(theirs.Mode, names)) is joined(Mode, names)

    @pytest.mark.parametrize("names", MODES, ids="|".join)
    def test_modes_are_keys_of_mappings(self, theirs: Any, names: tuple[str, ...]) -> None:
        repository, newer = ToyRepository(Plus10), ToyRepository(Plus20)
        written = {"Scale": {"cpu": {joined(theirs.Mode, names): repository}}}
        mapping = KernelMapping.parse(written)
        assert mapping == KernelMapping.parse({"Scale": {"cpu": {joined(Mode, names): repository}}})
        # One mode of two classes, in one dict.
        both = {joined(Mode, names): newer, joined(theirs.Mode, names): repository}
        assert KernelMapping.parse({"Scale": {"cpu": both}}) == mapping

    def test_kernelize_takes_modes(self, theirs: Any) -> None:
        mapping = {
            "Scale": {
                "cpu": {
                    theirs.Mode.INFERENCE: ToyRepository(Plus10),
                    theirs.Mode.TRAINING | theirs.Mode.TORCH_COMPILE: ToyRepository(Plus20),
                }
            }
        }
        with use_kernel_mapping(mapping, inherit_mapping=False):
            model = kernelize(Scale(2.0), mode=theirs.Mode.INFERENCE)
            assert result(model) == 12
            kernelize(model, mode=theirs.Mode.TRAINING | theirs.Mode.TORCH_COMPILE)
            with torch.no_grad():  # it adds 20, and has no parameters to train
                assert result(model) == 22
        report = last_report()
        assert report is not None
        assert report.decisions[0].mode == "TRAINING | TORCH_COMPILE"

    def test_mode_is_an_option_of_the_backend(self, theirs: Any) -> None:
        options = Options.parse(options={"kernel_mode": theirs.Mode.TRAINING})
        assert options.kernel_mode is Mode.TRAINING | Mode.TORCH_COMPILE

    def test_kernelize_refuses_modes_that_are_no_mode_of_a_model(self, theirs: Any) -> None:
        for mode in (theirs.Mode.FALLBACK, theirs.Mode.TORCH_COMPILE):
            with only(), pytest.raises(ValueError, match=f"INFERENCE or TRAINING.*got {mode.name}"):
                kernelize(Scale(), mode=mode)

    def test_flags_that_are_no_modes_are_refused(self) -> None:
        class Other(enum.Flag):
            INFERENCE = enum.auto()

        newer: Any = enum.Flag("Mode", ["INFERENCE", "EXPORT"])  # type: ignore[misc]
        assert Mode.parse(newer.INFERENCE) is Mode.INFERENCE
        for mode in (Other.INFERENCE, newer.EXPORT, newer.INFERENCE | newer.EXPORT, "INFERENCE", 4):
            with pytest.raises(TypeError, match="expected a kernelgraph Mode, got"):
                Mode.parse(mode)
            with only(), pytest.raises(TypeError, match="expected a kernelgraph Mode, got"):
                kernelize(Scale(), mode=mode)
            with pytest.raises(TypeError, match=r'mapping\["a"\]\["cpu"\]: expected Mode keys'):
                KernelMapping.parse({"a": {"cpu": {mode: ToyRepository(Plus10)}}})


class TestFallbackFlags:
    def test_fallback_flags_stand_for_ours_by_their_names(self, theirs: Any) -> None:
        for name, flag in KernelizeFallback.__members__.items():
            assert KernelizeFallback.parse(theirs.KernelizeFallback[name]) == flag

    def test_kernelize_takes_fallback_flags(self, theirs: Any) -> None:
        flags = theirs.KernelizeFallback
        with only(Scale=BrokenRepository()):
            kernelize(Scale(), mode=Mode.INFERENCE, use_fallback=flags.ALL)
            with pytest.raises(OSError, match="out of reach"):
                kernelize(Scale(), mode=Mode.INFERENCE, use_fallback=flags.DEFAULT)
        with only(), pytest.raises(ValueError, match="use_fallback does not allow"):
            kernelize(Scale(), mode=Mode.INFERENCE, use_fallback=flags.NONE)


class TestDevices:
    def test_devices_stand_for_ours_by_their_fields(self, theirs: Any) -> None:
        pairs = [
            (theirs.Device("cpu"), Device("cpu")),
            (theirs.Device("cuda"), Device("cuda")),
            (
                theirs.Device("cuda", theirs.CUDAProperties(80, 90)),
                Device("cuda", CUDAProperties(80, 90)),
            ),
            (
                theirs.Device("rocm", theirs.ROCMProperties(94, 95)),
                Device("rocm", ROCMProperties(94, 95)),
            ),
        ]
        for given, expected in pairs:
            assert Device.parse(given) == expected
        assert Device("cuda", theirs.CUDAProperties(80, 90)) == pairs[2][1]

    def test_devices_are_keys_of_mappings(self, theirs: Any) -> None:
        wide, narrow = ToyRepository(Plus10), ToyRepository(Plus20)
        mapping = KernelMapping.parse(
            {
                "Scale": {
                    theirs.Device("cuda", theirs.CUDAProperties(80, 90)): narrow,
                    theirs.Device("cuda"): wide,
                }
            }
        )
        for capability, chosen in ((75, wide), (80, narrow), (90, narrow), (100, wide)):
            found = selections(mapping, "Scale", Target("cuda", capability), Mode.INFERENCE)
            assert not isinstance(found, Rejection)
            assert found[0].repository is chosen
        # The same device and bounds registered again replace the entry, whoever wrote them.
        newer = KernelMapping.parse({"Scale": {Device("cuda", CUDAProperties(80, 90)): wide}})
        assert len(mapping.merge(newer).layers["Scale"]) == 2

    def test_kernelize_takes_devices(self, theirs: Any) -> None:
        assert target_of(theirs.Device("cuda", theirs.CUDAProperties(86, 86))) == Target("cuda", 86)
        with only(Scale=Plus10):
            model = kernelize(Scale(2.0), mode=Mode.INFERENCE, device=theirs.Device("cpu"))
        assert result(model) == 12

    def test_devices_that_do_not_exist_are_refused(self) -> None:
        class Properties:
            min_capability = max_capability = 80

        for device, error, message in (
            (other_package.Device("vulkan"), ValueError, 'unknown device type "vulkan"'),
            (
                other_package.Device("cpu", other_package.CUDAProperties(1, 2)),
                ValueError,
                "no properties",
            ),
            (
                other_package.Device("cuda", other_package.ROCMProperties(1, 2)),
                ValueError,
                "not ROCMProp",
            ),
            (
                other_package.Device("cuda", other_package.CUDAProperties(2, 1)),
                ValueError,
                "2 exceeds max",
            ),
            (other_package.Device("cuda", Properties()), TypeError, "expected CUDAProperties"),  # type: ignore[arg-type]
            (torch.device("cpu"), TypeError, "got torch.device"),
        ):
            with pytest.raises(error, match=rf'mapping\["a"\]: .*{message}'):
                KernelMapping.parse({"a": {device: ToyRepository(Plus10)}})


class TestRepositories:
    def test_report_names_the_repository_and_the_layer(self, theirs: Any, tmp_path: Path) -> None:
        path = write_kernel(tmp_path / "kernel", result=10)

        @kernelgraph.use_kernel_forward_from_hub("Add")
        class Add(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 1

        for repository, name in (
            (theirs.LocalLayerRepository(path, layer_name="Add"), "Add"),
            (theirs.LocalFuncRepository(path, func_name="shifted"), "shifted"),
        ):
            with use_kernel_mapping({"Add": {theirs.Device("cpu"): repository}}):
                model = kernelize(Add(), mode=theirs.Mode.INFERENCE, device="cpu")
            assert result(model) == 11
            report = last_report()
            assert report is not None
            assert report.kernels[0].kernel.startswith(f"{path}@")
            assert report.kernels[0].kernel.endswith(f": {name}")

    def test_mappings_of_equal_repositories_are_equal(self, theirs: Any, tmp_path: Path) -> None:
        def mapping() -> KernelMapping:
            repository = theirs.LocalLayerRepository(tmp_path, layer_name="Add")
            return KernelMapping.parse({"Add": {"cpu": {theirs.Mode.INFERENCE: repository}}})

        assert mapping() == mapping()
        assert hash(mapping()) == hash(mapping())


class TestFunctions:
    """Functions that the other package made layers and attached to the modules that call them."""

    @staticmethod
    def model(theirs: Any) -> nn.Module:
        @theirs.use_kernel_forward_from_hub("double")
        def double(x: Tensor) -> Tensor:
            return 2 * x

        @theirs.use_kernelized_func(double)
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return double(x) + 1

        return Model()

    def test_kernelize_finds_functions(self, theirs: Any, tmp_path: Path) -> None:
        class Double(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x + 10

        model = self.model(theirs)
        assert result(model) == 3
        path = write_kernel(tmp_path / "kernel", result=20)
        for repository, expected in (
            (ToyRepository(Double), 13),
            (theirs.LocalFuncRepository(path, func_name="shifted"), 22),
            (theirs.LocalLayerRepository(path, layer_name="Add"), 22),
        ):
            with only(double=repository):
                kernelize(model, mode=theirs.Mode.INFERENCE, device="cpu")
            assert result(model) == expected
            report = last_report()
            assert report is not None
            (decision,) = report.decisions
            assert (decision.path, decision.layer) == ("double", "double")
            assert decision.reason is Reason.KERNEL
        with only():
            kernelize(model, mode=theirs.Mode.INFERENCE, device="cpu")
        assert result(model) == 3

    def test_kernelize_finds_functions_in_a_deep_copy_of_a_model(
        self, theirs: Any, tmp_path: Path
    ) -> None:
        """The attached function is copied too, but the module still calls the original one."""
        scope: dict[str, Any] = {"theirs": theirs, "nn": nn}
        exec(MODEL, scope)
        model = scope["Model"]()
        path = write_kernel(tmp_path / "kernel", result=20)
        with only(double=theirs.LocalFuncRepository(path, func_name="shifted")):
            copied = kernelize(copy.deepcopy(model), mode=theirs.Mode.INFERENCE, device="cpu")
            assert result(copied) == 22


MODEL = """
@theirs.use_kernel_forward_from_hub("double")
def double(x):
    return 2 * x

@theirs.use_kernelized_func(double)
class Model(nn.Module):
    def forward(self, x):
        return double(x) + 1
"""


def test_mapping_of_transformers_is_a_mapping_for_us() -> None:
    pytest.importorskip("kernels")
    pytest.importorskip("transformers")
    hub_kernels = importlib.import_module("transformers.integrations.hub_kernels")
    mapping = KernelMapping.parse(hub_kernels._build_kernel_mapping())
    chosen = selections(mapping, "RMSNorm", Target("cuda", 90), Mode.INFERENCE)
    assert not isinstance(chosen, Rejection)
    assert chosen[0].repository.layer_name == "LigerRMSNorm"  # type: ignore[attr-defined]
    gdn = selections(mapping, "Qwen3_5GatedDeltaNet", Target("cuda", 90), Mode.INFERENCE)
    assert isinstance(gdn, Rejection)
    assert gdn.reason is Reason.NO_CAPABILITY
