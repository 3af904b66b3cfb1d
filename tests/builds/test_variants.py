"""Variants: parsing their names, the choice of the best, and the reasons against the others."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraph.builds.variants import Kind, System, choose, no_variant, parse_variant

CPU = System((2, 13), True, "cpu", None, "x86_64", "linux")
CUDA = replace(CPU, backend="cuda", version=(13, 0))


def why(name: str, system: System = CPU) -> str:
    (refusal,) = choose([name], system).refused
    assert refusal.name == name
    return refusal.why


class TestNames:
    @pytest.mark.parametrize(
        ("name", "torch", "abi", "backend", "version", "arch", "os"),
        [
            (
                "torch213-cxx11-cu130-x86_64-linux",
                (2, 13),
                True,
                "cuda",
                (13, 0),
                "x86_64",
                "linux",
            ),
            ("torch29-cpu-aarch64-darwin", (2, 9), None, "cpu", None, "aarch64", "darwin"),
            ("torch26-cxx98-cu118-x86_64-linux", (2, 6), False, "cuda", (11, 8), "x86_64", "linux"),
            (
                "torch213-cu1310-x86_64-windows",
                (2, 13),
                None,
                "cuda",
                (13, 10),
                "x86_64",
                "windows",
            ),
            (
                "torch212-cxx11-rocm71-x86_64-linux",
                (2, 12),
                True,
                "rocm",
                (7, 1),
                "x86_64",
                "linux",
            ),
            ("torch212-xpu20253-x86_64-linux", (2, 12), None, "xpu", (2025, 3), "x86_64", "linux"),
            ("torch212-cann84-aarch64-linux", (2, 12), None, "npu", (8, 4), "aarch64", "linux"),
            ("torch212-metal-arm64-darwin", (2, 12), None, "mps", None, "aarch64", "darwin"),
            ("torch212-neuron-x86_64-linux", (2, 12), None, "neuron", None, "x86_64", "linux"),
            ("torch212-tpu-x86_64-linux", (2, 12), None, "tpu", None, "x86_64", "linux"),
        ],
    )
    def test_name_for_one_torch_release_is_parsed(
        self, name, torch, abi, backend, version, arch, os
    ):
        found = parse_variant(name)
        assert found is not None
        assert found.kind is Kind.TORCH
        fields = (found.torch, found.cxx11_abi, found.backend, found.version, found.arch, found.os)
        assert fields == (torch, abi, backend, version, arch, os)

    def test_name_for_the_stable_abi_is_parsed(self):
        found = parse_variant("torch-stable-abi210-cu126-x86_64-linux")
        assert found is not None
        assert (found.kind, found.torch) == (Kind.STABLE_ABI, (2, 10))
        assert (found.backend, found.version) == ("cuda", (12, 6))

    @pytest.mark.parametrize(
        ("name", "backend"),
        [
            ("torch-cpu", "cpu"),
            ("torch-cuda", "cuda"),
            ("torch-rocm", "rocm"),
            ("torch-xpu", "xpu"),
            ("torch-metal", "mps"),
            ("torch-npu", "npu"),
            ("torch-cann", "npu"),
            ("torch-neuron", "neuron"),
            ("torch-tpu", "tpu"),
            ("torch-universal", None),
        ],
    )
    def test_name_with_nothing_compiled_is_parsed(self, name, backend):
        found = parse_variant(name)
        assert found is not None
        assert found.backend == backend
        assert found.kind is (Kind.BACKEND if backend else Kind.UNIVERSAL)

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "torch",
            "torch-",
            "torch-quantum",
            "torch213",
            "torch2-cpu-x86_64-linux",
            "torch213-cpu-x86_64",
            "torch213-cu-x86_64-linux",
            "torch213-cxx20-cpu-x86_64-linux",
            "torch-stable-abi29-cxx11-cpu-x86_64-linux",
            "torch213-cpu-x86_64-linux/..",
            "torch213-cpu-x86_64-linux\n",
            "torch2" + "1" * 5000 + "-cpu-x86_64-linux",
            "torch२१३-cpu-x86_64-linux",
            "tvm-ffi01-cpu-x86_64-linux",
            "__pycache__",
        ],
    )
    def test_other_name_is_no_variant(self, name):
        assert parse_variant(name) is None
        assert why(name) == "not the name of a build variant"

    @given(st.text())
    def test_any_text_is_parsed_without_an_error(self, name):
        parse_variant(name)
        parse_variant(f"torch{name}")


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "system", "expected"),
        [
            ("torch29-cpu-x86_64-linux", CPU, "built for torch 2.9, this is 2.13"),
            (
                "torch-stable-abi214-cpu-x86_64-linux",
                CPU,
                "built for torch 2.14 and newer, this is 2.13",
            ),
            (
                "torch213-cxx98-cpu-x86_64-linux",
                CPU,
                "built for the cxx98 ABI, this torch has cxx11",
            ),
            ("torch213-cu130-x86_64-linux", CPU, "built for cuda, wanted for cpu"),
            ("torch-rocm", CUDA, "built for rocm, wanted for cuda"),
            ("torch213-cu131-x86_64-linux", CUDA, "built for cuda 13.1, newer than 13.0"),
            ("torch213-cu128-x86_64-linux", CUDA, "built for cuda 12.8, this is 13.0"),
            (
                "torch213-cu130-x86_64-linux",
                replace(CUDA, version=None),
                "built for cuda 13.0, this torch is built without cuda",
            ),
            (
                "torch213-rocm70-x86_64-linux",
                replace(CPU, backend="rocm", version=(7, 1)),
                "built for rocm 7.0, this is 7.1",
            ),
            ("torch213-cpu-aarch64-linux", CPU, "built for aarch64, this is x86_64"),
            ("torch213-cpu-x86_64-windows", CPU, "built for windows, this is linux"),
            (
                "torch29-cpu-aarch64-darwin",
                CPU,
                "built for torch 2.9, this is 2.13; built for aarch64, this is x86_64; "
                "built for darwin, this is linux",
            ),
        ],
    )
    def test_refusal_states_each_reason(self, name, system, expected):
        assert why(name, system) == expected

    def test_error_lists_every_variant(self):
        choice = choose(["torch29-cpu-x86_64-linux", "torch-cuda"], CPU)
        assert str(no_variant("owner/name", choice, CPU)) == (
            "no build variant of owner/name fits this system "
            "(torch 2.13, cxx11 ABI, cpu, x86_64-linux)\n"
            "  torch-cuda: built for cuda, wanted for cpu\n"
            "  torch29-cpu-x86_64-linux: built for torch 2.9, this is 2.13"
        )

    def test_error_without_variants(self):
        message = str(no_variant("here", choose([], CUDA), CUDA))
        assert message.startswith("no build variant of here fits this system (torch 2.13, ")
        assert "cuda 13.0" in message
        assert message.endswith("  its build/ has no variants")


class TestPreference:
    def test_fitting_variants_are_sorted_best_first(self):
        best_first = (
            "torch-stable-abi213-cu126-x86_64-linux",
            "torch-stable-abi29-cu128-x86_64-linux",
            "torch-stable-abi29-cu126-x86_64-linux",
            "torch213-cu128-x86_64-linux",
            "torch213-cxx11-cu128-x86_64-linux",
            "torch213-cu126-x86_64-linux",
            "torch213-cxx11-cu126-x86_64-linux",
            "torch-cuda",
            "torch-universal",
        )
        system = replace(CUDA, version=(12, 9))
        for names in (best_first, reversed(best_first), sorted(best_first)):
            assert choose(names, system).fitting == best_first

    def test_machine_names_are_normalised(self):
        mac = System((2, 13), True, "mps", None, "arm64", "darwin")
        assert mac.arch == "aarch64"
        assert choose(["torch213-metal-aarch64-darwin"], mac).best
        windows = System((2, 13), True, "cpu", None, "AMD64", "windows")
        assert choose(["torch213-cpu-x86_64-windows"], windows).best

    def test_two_spellings_of_one_backend_have_a_fixed_order(self):
        npu = replace(CPU, backend="npu")
        assert choose(["torch-npu", "torch-cann"], npu).fitting == ("torch-cann", "torch-npu")


# --- against an oracle ------------------------------------------------------------------------
# The names are written from their parts, and the oracle judges the parts. It shares no code with
# the parser, and finds the best by comparing each pair.

CUDAS = ["cu118", "cu126", "cu128", "cu130", "cu132"]
BACKENDS = ["cpu", *CUDAS, "rocm70", "rocm71", "xpu20252", "xpu20253", "metal"]
VERSIONS = {
    "cu118": ("cuda", 11, 8),
    "cu126": ("cuda", 12, 6),
    "cu128": ("cuda", 12, 8),
    "cu130": ("cuda", 13, 0),
    "cu132": ("cuda", 13, 2),
    "rocm70": ("rocm", 7, 0),
    "rocm71": ("rocm", 7, 1),
    "xpu20252": ("xpu", 2025, 2),
    "xpu20253": ("xpu", 2025, 3),
    "cpu": ("cpu", 0, 0),
    "metal": ("mps", 0, 0),
}
TORCHES = ["29", "210", "213", "214"]

parts = st.one_of(
    st.tuples(
        st.just("exact"),
        st.sampled_from(TORCHES),
        st.sampled_from(["", "cxx11", "cxx98"]),
        st.sampled_from(BACKENDS),
        st.sampled_from(["x86_64", "aarch64"]),
        st.sampled_from(["linux", "darwin"]),
    ),
    st.tuples(
        st.just("stable"),
        st.sampled_from(TORCHES),
        st.just(""),
        st.sampled_from(BACKENDS),
        st.sampled_from(["x86_64", "aarch64"]),
        st.sampled_from(["linux", "darwin"]),
    ),
    st.tuples(st.just("noarch"), st.sampled_from(["cpu", "cuda", "rocm", "xpu", "metal"])),
    st.tuples(st.just("noarch"), st.just("universal")),
)

systems = st.builds(
    lambda torch, abi, backend, arch, os: (torch, abi, backend, arch, os),
    st.sampled_from(TORCHES),
    st.booleans(),
    st.sampled_from(BACKENDS),
    st.sampled_from(["x86_64", "aarch64"]),
    st.sampled_from(["linux", "darwin"]),
)


def name_of(part) -> str:
    kind = part[0]
    if kind == "noarch":
        return f"torch-{part[1]}"
    _, torch, tag, backend, arch, os = part
    head = f"torch{torch}" if kind == "exact" else f"torch-stable-abi{torch}"
    return "-".join(p for p in (head, tag, backend, arch, os) if p)


def system_of(described) -> System:
    torch, abi, backend, arch, os = described
    kind, major, minor = VERSIONS[backend]
    version = (major, minor) if kind in ("cuda", "rocm", "xpu") else None
    return System((2, int(torch[1:])), abi, kind, version, arch, os)


def oracle_fits(part, described) -> bool:
    torch, abi, backend, arch, os = described
    kind, major, minor = VERSIONS[backend]
    if part[0] == "noarch":
        return part[1] in ("universal", kind) or (part[1] == "metal" and kind == "mps")
    built = VERSIONS[part[3]]
    if built[0] == "cuda":
        backend_fits = kind == "cuda" and built[1] == major and built[2] <= minor
    else:
        backend_fits = built == (kind, major, minor)
    built_minor, minor_here = int(part[1][1:]), int(torch[1:])
    torch_fits = built_minor == minor_here or (part[0] == "stable" and built_minor < minor_here)
    abi_fits = part[2] in ("", "cxx11" if abi else "cxx98")
    return backend_fits and torch_fits and abi_fits and part[4] == arch and part[5] == os


def oracle_better(a, b) -> bool:
    """Whether ``a`` is strictly better than ``b``, both of which fit."""

    def group(part) -> int:
        if part[0] == "noarch":
            return 3 if part[1] == "universal" else 2
        return 0 if part[0] == "stable" else 1

    if group(a) != group(b):
        return group(a) < group(b)
    if group(a) >= 2:
        return False
    if a[1] != b[1]:
        return int(a[1][1:]) > int(b[1][1:])
    if a[3] != b[3]:
        return VERSIONS[a[3]][2] > VERSIONS[b[3]][2]
    return a[2] == "" and b[2] != ""


@settings(max_examples=300)
@given(st.lists(parts, max_size=12, unique=True), systems)
def test_choice_agrees_with_an_oracle(builds, described):
    fitting = [build for build in builds if oracle_fits(build, described)]
    choice = choose([name_of(build) for build in builds], system_of(described))

    assert set(choice.fitting) == {name_of(build) for build in fitting}
    assert {r.name for r in choice.refused} == {name_of(b) for b in builds if b not in fitting}
    by_name = {name_of(build): build for build in builds}
    for better, worse in itertools.combinations(choice.fitting, 2):
        assert not oracle_better(by_name[worse], by_name[better])


@given(st.lists(parts, max_size=6, unique=True), systems, st.randoms())
def test_order_of_the_names_does_not_matter(builds, described, random):
    names = [name_of(build) for build in builds]
    shuffled = random.sample(names, len(names))
    system = system_of(described)
    assert choose(names, system) == choose(shuffled + names, system)


class TestDetect:
    def test_system_of_the_cpu(self):
        import torch

        system = System.detect("cpu")
        assert f"{system.torch[0]}.{system.torch[1]}." in torch.__version__
        assert (system.backend, system.version) == ("cpu", None)
        assert system.cxx11_abi == torch.compiled_with_cxx11_abi()

    @pytest.mark.parametrize(
        ("device", "attribute", "value", "version"),
        [
            ("cuda", "cuda", "13.0", (13, 0)),
            ("cuda", "cuda", None, None),
            ("rocm", "hip", "7.1.25424-4179531dcd", (7, 1)),
            ("xpu", "xpu", "20250302", (2025, 3)),
            ("xpu", "xpu", None, None),
        ],
    )
    def test_system_has_the_version_that_torch_was_built_for(
        self, monkeypatch, device, attribute, value, version
    ):
        import torch

        monkeypatch.setattr(torch.version, attribute, value, raising=False)
        system = System.detect(device)
        assert (system.backend, system.version) == (device, version)

    def test_system_of_the_cpu_in_a_cuda_build_of_torch_has_no_version(self, monkeypatch):
        import torch

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert System.detect("cpu").version is None

    def test_system_of_an_npu_without_its_package_has_no_version(self):
        assert System.detect("npu").version is None


def test_importing_the_package_imports_neither_torch_nor_the_hub_client():
    code = (
        "import kernelgraph.hub.repositories, kernelgraph.builds.check, sys;"
        "print([name for name in ('torch', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
