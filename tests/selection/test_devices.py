"""Devices: their properties, and the concrete device that each stands for on this machine."""

import pickle
import subprocess

import pytest

from kernelgraph.selection import devices
from kernelgraph.selection.devices import (
    DEVICE_TYPES,
    CUDAProperties,
    Device,
    ROCMProperties,
    Target,
    driver_version,
    target_of,
)
from tests.support.messages import whole
from tests.support.sources import import_example

TYPES = "there are cpu, cuda, rocm, mps, npu, xpu, neuron, tpu (metal means mps)"
PROPERTIES = pytest.mark.parametrize("properties", [CUDAProperties, ROCMProperties])


class TestProperties:
    @PROPERTIES
    def test_bounds_are_inclusive(self, properties):
        bounds = properties(min_capability=80, max_capability=90)
        assert [c for c in range(100) if c in bounds] == list(range(80, 91))
        assert 86 in properties(86, 86)
        assert 0 in properties(0, 0)

    @PROPERTIES
    def test_both_bounds_are_required(self, properties):
        with pytest.raises(TypeError, match="max_capability"):
            properties(80)
        with pytest.raises(TypeError, match="min_capability"):
            properties(max_capability=80)

    @PROPERTIES
    def test_reversed_bounds_are_refused(self, properties):
        with pytest.raises(ValueError, match=whole("min_capability 90 exceeds max_capability 80")):
            properties(90, 80)

    @PROPERTIES
    @pytest.mark.parametrize(
        ("bound", "got"), [(8.6, "float"), ("86", "str"), (True, "bool"), (None, "NoneType")]
    )
    def test_bounds_that_are_no_ints_are_refused(self, properties, bound, got):
        message = rf"_capability: expected an int \(8.6 is written 86\), got {got}$"
        with pytest.raises(TypeError, match="^min" + message):
            properties(bound, 90)
        with pytest.raises(TypeError, match="^max" + message):
            properties(0, bound)

    @PROPERTIES
    def test_negative_bounds_are_refused(self, properties):
        with pytest.raises(ValueError, match=whole("min_capability must not be negative, got -1")):
            properties(-1, 90)

    def test_equality_hash_and_repr_go_by_class_and_bounds(self):
        assert CUDAProperties(80, 90) == CUDAProperties(80, 90) != CUDAProperties(80, 86)
        assert hash(CUDAProperties(80, 90)) == hash(CUDAProperties(80, 90))
        assert CUDAProperties(80, 90) != ROCMProperties(80, 90)
        assert (
            repr(ROCMProperties(90, 94)) == "ROCMProperties(min_capability=90, max_capability=94)"
        )

    @PROPERTIES
    def test_properties_are_frozen(self, properties):
        with pytest.raises(AttributeError):
            properties(80, 90).min_capability = 70


class TestDevice:
    @pytest.mark.parametrize("kind", DEVICE_TYPES)
    def test_every_type_is_a_device(self, kind):
        assert Device(kind).type == kind
        assert Device(kind).properties is None
        assert str(Device(kind)) == kind
        assert Device.parse(kind) == Device(kind)

    def test_metal_is_mps(self):
        assert Device("metal") == Device("mps")
        assert hash(Device("metal")) == hash(Device("mps"))
        assert Device("metal").type == "mps"

    @pytest.mark.parametrize("kind", ["gpu", "CUDA", "", "cuda:1", "cuda "])
    def test_unknown_types_are_refused(self, kind):
        for make in (Device, Device.parse, Target):
            with pytest.raises(ValueError, match=whole(f'unknown device type "{kind}": {TYPES}')):
                make(kind)

    def test_a_type_that_is_no_str_is_refused(self):
        with pytest.raises(TypeError, match=whole("device type: expected a str, got int")):
            Device(3)

    def test_properties_of_the_type_are_shown(self):
        assert str(Device("cuda", CUDAProperties(80, 90))) == "cuda 80-90"
        assert str(Device("rocm", ROCMProperties(94, 94))) == "rocm 94"

    def test_properties_of_another_type_are_refused(self):
        cuda, rocm = CUDAProperties(80, 90), ROCMProperties(90, 94)
        with pytest.raises(
            ValueError, match=whole('device type "cuda" takes CUDAProperties, not ROCMProperties')
        ):
            Device("cuda", rocm)
        with pytest.raises(
            ValueError, match=whole('device type "rocm" takes ROCMProperties, not CUDAProperties')
        ):
            Device("rocm", cuda)
        for kind in set(DEVICE_TYPES) - {"cuda", "rocm"}:
            with pytest.raises(ValueError, match=f'^device type "{kind}" takes no properties$'):
                Device(kind, cuda)

    @pytest.mark.parametrize("properties", [86, (80, 90), CUDAProperties])
    def test_other_objects_are_no_properties(self, properties):
        with pytest.raises(
            TypeError, match=r"^properties: expected CUDAProperties, ROCMProperties or None, got "
        ):
            Device("cuda", properties)

    def test_parse_returns_a_device_itself(self):
        device = Device("cuda", CUDAProperties(80, 90))
        assert Device.parse(device) is device
        with pytest.raises(
            TypeError, match=whole("expected a device type (str) or a Device, got int")
        ):
            Device.parse(3)

    def test_devices_are_frozen_hashable_and_picklable(self):
        device = Device("cuda", CUDAProperties(80, 90))
        assert {device: 1}[Device("cuda", CUDAProperties(80, 90))] == 1
        assert pickle.loads(pickle.dumps(device)) == device
        with pytest.raises(AttributeError):
            device.type = "rocm"


class TestTarget:
    def test_a_target_is_made_without_a_gpu(self):
        assert Target("cuda", 86).capability == 86
        assert str(Target("cuda", 86)) == "cuda 86"
        assert str(Target("cuda", None)) == "cuda"
        assert Target("metal") == Target("mps", None)
        assert hash(Target("cuda", 86)) == hash(Target("cuda", 86))

    def test_a_wrong_capability_is_refused(self):
        with pytest.raises(
            TypeError, match=whole("capability: expected an int (8.6 is written 86), got float")
        ):
            Target("cuda", 8.6)
        with pytest.raises(ValueError, match=whole("capability must not be negative, got -1")):
            Target("cuda", -1)
        with pytest.raises(ValueError, match=whole('device type "cpu" has no capability')):
            Target("cpu", 86)

    def test_a_target_is_frozen(self):
        with pytest.raises(AttributeError):
            Target("cuda", 86).capability = 90


@pytest.fixture
def gpus(monkeypatch):
    """Make torch see GPUs with these capabilities, the second of them being the current one."""
    torch = pytest.importorskip("torch")

    def see(*capabilities, hip=None):
        def capability_of(index=None):
            return capabilities[1 if index is None else index]

        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
        return torch

    return see


class TestTargetOf:
    @pytest.mark.parametrize("kind", sorted(set(DEVICE_TYPES) - {"cuda", "rocm"}))
    def test_types_without_capability_have_none(self, kind):
        assert target_of(kind) == target_of(f"{kind}:0") == Target(kind, None)
        assert target_of(Device(kind)) == Target(kind, None)

    def test_metal_is_the_target_mps(self):
        assert target_of("metal") == Target("mps", None)

    def test_torch_devices_are_targets(self):
        torch = pytest.importorskip("torch")
        assert target_of(torch.device("cpu")) == Target("cpu", None)
        assert target_of(torch.device("mps", 0)) == Target("mps", None)
        assert target_of(torch.empty(1).device) == Target("cpu", None)

    def test_capability_is_that_of_the_index(self, gpus):
        torch = gpus((8, 0), (8, 6), (10, 0))
        assert target_of("cuda:0") == Target("cuda", 80)
        assert target_of("cuda:2") == Target("cuda", 100)
        assert target_of(torch.device("cuda", 1)) == Target("cuda", 86)
        assert target_of(torch.device("cuda:2")) == Target("cuda", 100)

    def test_without_an_index_it_is_the_current_device(self, gpus):
        torch = gpus((8, 0), (9, 0))
        assert target_of("cuda") == Target("cuda", 90)
        assert target_of(torch.device("cuda")) == Target("cuda", 90)
        assert target_of(Device("cuda")) == Target("cuda", 90)

    def test_capability_is_unknown_without_a_gpu(self, gpus):
        torch = gpus()
        for device in ("cuda", "cuda:3", torch.device("cuda", 1), Device("cuda")):
            assert target_of(device) == Target("cuda", None)
        assert target_of("rocm") == Target("rocm", None)

    def test_cuda_of_a_hip_build_is_rocm(self, gpus):
        torch = gpus((9, 0), (9, 4), hip="6.4.0")
        for device in ("cuda:1", "rocm:1", "cuda", "rocm", torch.device("cuda:1"), Device("cuda")):
            assert target_of(device) == Target("rocm", 94)
        assert target_of("rocm:0") == Target("rocm", 90)

    def test_cuda_of_a_hip_build_without_a_gpu_is_rocm(self, gpus):
        gpus(hip="6.4.0")
        assert target_of("cuda") == target_of("rocm") == Target("rocm", None)

    def test_rocm_has_no_capability_on_a_cuda_build(self, gpus):
        gpus((8, 0), (9, 0))
        assert target_of("rocm") == target_of("rocm:7") == Target("rocm", None)

    def test_an_index_beyond_the_gpus_is_refused(self, gpus):
        gpus((8, 0), (9, 0))
        with pytest.raises(
            ValueError, match=whole('there is no device "cuda:2": torch sees 2, from 0')
        ):
            target_of("cuda:2")

    def test_a_target_stands_for_itself(self):
        target = Target("cuda", 86)
        assert target_of(target) is target

    def test_a_device_with_one_capability_is_a_target(self):
        assert target_of(Device("cuda", CUDAProperties(86, 86))) == Target("cuda", 86)

    def test_a_device_with_several_capabilities_is_refused(self):
        with pytest.raises(
            ValueError,
            match=whole(
                "cuda 80-90 is an interval of capabilities, not one device:"
                ' pass "cuda", or a Target with one capability'
            ),
        ):
            target_of(Device("cuda", CUDAProperties(80, 90)))

    @pytest.mark.parametrize(
        "device", ["gpu", "cuda:", "cuda:x", "cuda:01", "cuda:-1", "gpu:1", ""]
    )
    def test_unknown_strings_are_refused(self, device):
        with pytest.raises(ValueError, match=whole(f'unknown device type "{device}": {TYPES}')):
            target_of(device)

    def test_a_torch_device_of_an_unknown_type_is_refused(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(ValueError, match=r'^unknown device type "meta": there are cpu, '):
            target_of(torch.device("meta"))

    @pytest.mark.parametrize(("device", "got"), [(3, "int"), (None, "NoneType"), (b"cpu", "bytes")])
    def test_other_objects_are_no_device(self, device, got):
        pytest.importorskip("torch")
        with pytest.raises(
            TypeError,
            match=whole(f"device: expected a str, a torch.device, a Device or a Target, got {got}"),
        ):
            target_of(device)

    @pytest.mark.cuda
    def test_capability_is_that_of_a_real_gpu(self):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        major, minor = torch.cuda.get_device_capability(0)
        kind = "cuda" if torch.version.hip is None else "rocm"
        assert target_of("cuda:0") == Target(kind, major * 10 + minor)


NVML = """
#include <cstring>

extern "C" int nvmlInit_v2() { return %d; }

extern "C" int nvmlSystemGetDriverVersion(char* version, unsigned int length) {
  if (length < 80) return 7;  // NVML_ERROR_INSUFFICIENT_SIZE
  std::strcpy(version, "580.159.04");
  return %d;
}
"""


class TestDriverVersion:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        driver_version.cache_clear()
        yield
        driver_version.cache_clear()

    @pytest.mark.parametrize(
        ("codes", "version"), [((0, 0), "580.159.04"), ((9, 0), ""), ((0, 9), "")]
    )
    def test_the_version_is_that_of_the_driver(self, tmp_path, monkeypatch, codes, version):
        source, library = tmp_path / "nvml.cpp", tmp_path / "libnvidia-ml.so.1"
        source.write_text(NVML % codes)
        compiler = import_example("kernels/build").find_compiler()[0]
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        monkeypatch.setattr(devices, "NVML", str(library))
        assert driver_version() == version

    @pytest.mark.parametrize("library", ["libkernelgraph-none.so.1", None], ids=["none", "other"])
    def test_the_version_is_empty_without_a_driver(self, monkeypatch, library):
        monkeypatch.setattr(devices, "NVML", library)  # without a name it is the program itself
        assert driver_version() == ""
