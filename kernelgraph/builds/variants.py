"""Build variants: parsing their names, and choosing the one that fits this system best.

The names follow the Hub's kernel requirements. A variant is a build for one torch release; for a
torch release and newer (the stable ABI); for one backend, with nothing compiled; or for any
system::

    torch<MAJOR><MINOR>[-cxx11|-cxx98]-<backend>-<arch>-<os>
    torch-stable-abi<MAJOR><MINOR>-<backend>-<arch>-<os>
    torch-<backend type>
    torch-universal

This module names backends by their device types: a ``cu130`` build is for ``cuda``, ``cann`` means
``npu`` and ``metal`` means ``mps``.
"""

from __future__ import annotations

import functools
import importlib
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

Release = tuple[int, int]
"""A release's major and minor version."""


class Kind(IntEnum):
    """The kind of a variant; the order is that of preference."""

    STABLE_ABI = 0
    TORCH = 1
    BACKEND = 2
    UNIVERSAL = 3


# The spelling of each backend in the name of a compiled variant. A name writes the two numbers of a
# version without a dot, so the width of the major one is fixed: cu1210 is 12.10.
_BACKENDS = {
    "cpu": "cpu",
    "cuda": r"cu(\d\d)(\d{1,3})",
    "rocm": r"rocm(\d)(\d{1,3})",
    "xpu": r"xpu(\d{4})(\d{1,3})",
    "npu": r"cann(\d)(\d{1,3})",
    "mps": "metal",
    "neuron": "neuron",
    "tpu": "tpu",
}
# The spellings in ``torch-<backend type>`` that differ from the device type.
_NOARCH_ALIASES = {"metal": "mps", "cann": "npu"}

_ARCHS = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

_COMPILED = re.compile(
    r"torch(?:(?P<stable>-stable-abi)?(?P<major>\d)(?P<minor>\d{1,3}))"
    r"(?:-(?P<abi>cxx11|cxx98))?"
    r"-(?P<backend>[a-z]+\d*)-(?P<arch>\w+)-(?P<os>[a-z]+\d*)",
    re.ASCII,
)


@dataclass(frozen=True)
class Variant:
    """A parsed variant name; a part that the name does not mention is None."""

    name: str
    kind: Kind
    torch: Release | None = None
    cxx11_abi: bool | None = None
    backend: str | None = None
    version: Release | None = None
    arch: str | None = None
    os: str | None = None


@dataclass(frozen=True)
class System:
    """The system that a build has to fit: a process that runs kernels on one type of device."""

    torch: Release
    cxx11_abi: bool
    backend: str
    """A device type: cpu, cuda, rocm, mps, npu, xpu, neuron or tpu."""
    version: Release | None
    """The backend's version that torch was built for; None where there is none."""
    arch: str
    os: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", _arch(self.arch))

    @classmethod
    def detect(cls, device_type: str) -> System:
        """Describe this process, for kernels that run on ``device_type``."""
        import torch

        release = _release(torch.__version__)
        assert release is not None
        return cls(
            torch=release,
            cxx11_abi=torch.compiled_with_cxx11_abi(),
            backend=device_type,
            version=_backend_version(device_type),
            arch=platform.machine(),
            os=platform.system().lower(),
        )

    def __str__(self) -> str:
        abi = "cxx11" if self.cxx11_abi else "cxx98"
        backend = f"{self.backend} {_dotted(self.version)}" if self.version else self.backend
        return f"torch {_dotted(self.torch)}, {abi} ABI, {backend}, {self.arch}-{self.os}"


@dataclass(frozen=True)
class Refusal:
    """A directory in ``build/`` that cannot be used, and the reason."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclass(frozen=True)
class Choice:
    """The variants of one repository: the names that fit, best first, and the refused ones."""

    fitting: tuple[str, ...]
    refused: tuple[Refusal, ...]

    @property
    def best(self) -> str | None:
        """The name of the variant that fits best; None where none fits."""
        return self.fitting[0] if self.fitting else None


@functools.lru_cache(maxsize=4096)
def parse_variant(name: str) -> Variant | None:
    """Parse the name of a variant; None for a name that is not a variant's."""
    if name == "torch-universal":
        return Variant(name, Kind.UNIVERSAL)
    if name.startswith("torch-") and (written := name.removeprefix("torch-")).isalpha():
        backend = _NOARCH_ALIASES.get(written, written)
        return Variant(name, Kind.BACKEND, backend=backend) if backend in _BACKENDS else None

    parts = _COMPILED.fullmatch(name)
    if parts is None or (parts["stable"] and parts["abi"]):
        return None
    for backend, spelling in _BACKENDS.items():
        if version := re.fullmatch(spelling, parts["backend"], re.ASCII):
            return Variant(
                name,
                Kind.STABLE_ABI if parts["stable"] else Kind.TORCH,
                torch=(int(parts["major"]), int(parts["minor"])),
                cxx11_abi=parts["abi"] == "cxx11" if parts["abi"] else None,
                backend=backend,
                version=(int(version[1]), int(version[2])) if version.groups() else None,
                arch=_arch(parts["arch"]),
                os=parts["os"],
            )
    return None


def choose(names: Iterable[str], system: System) -> Choice:
    """Sort the variants of a repository into those that fit ``system``, best first, and the rest.

    A stable-ABI build is best (the newest ABI first), then one for exactly this torch, then
    ``torch-<backend>``, then ``torch-universal``. Among equals a higher CUDA minor version comes
    first, then a name without an ABI tag.
    """
    fitting: list[Variant] = []
    refused: list[Refusal] = []
    for name in sorted(set(names)):
        variant = parse_variant(name)
        if variant is None:
            refused.append(Refusal(name, "not the name of a build variant"))
        elif reasons := _objections(variant, system):
            refused.append(Refusal(name, "; ".join(reasons)))
        else:
            fitting.append(variant)
    fitting.sort(key=_rank)
    return Choice(tuple(variant.name for variant in fitting), tuple(refused))


def no_variant(repository: str, choice: Choice, system: System) -> FileNotFoundError:
    """Make the error for a repository of which no variant fits: it lists each with the reason."""
    lines = [f"no build variant of {repository} fits this system ({system})"]
    lines += [f"  {refusal}" for refusal in choice.refused] or ["  its build/ has no variants"]
    return FileNotFoundError("\n".join(lines))


def _rank(variant: Variant) -> tuple[int, Release, Release, bool, str]:
    newest_torch = _negated(variant.torch)
    newest_backend = _negated(variant.version)
    has_tag = variant.cxx11_abi is not None
    # The name comes last, so that two spellings of one thing always have the same order.
    return (variant.kind, newest_torch, newest_backend, has_tag, variant.name)


def _negated(release: Release | None) -> Release:
    return (-release[0], -release[1]) if release else (0, 0)


def _objections(variant: Variant, system: System) -> list[str]:
    """All reasons why a variant does not fit; empty where it fits."""
    reasons = []
    if variant.torch is not None:
        this = f"this is {_dotted(system.torch)}"
        if variant.kind is Kind.STABLE_ABI and variant.torch > system.torch:
            reasons.append(f"built for torch {_dotted(variant.torch)} and newer, {this}")
        if variant.kind is Kind.TORCH and variant.torch != system.torch:
            reasons.append(f"built for torch {_dotted(variant.torch)}, {this}")
    if variant.cxx11_abi is not None and variant.cxx11_abi != system.cxx11_abi:
        built, this = ("cxx11", "cxx98") if variant.cxx11_abi else ("cxx98", "cxx11")
        reasons.append(f"built for the {built} ABI, this torch has {this}")
    if variant.backend is not None and variant.backend != system.backend:
        reasons.append(f"built for {variant.backend}, wanted for {system.backend}")
    elif reason := _version_objection(variant, system):
        reasons.append(reason)
    reasons += [
        f"built for {built}, this is {this}"
        for built, this in ((variant.arch, system.arch), (variant.os, system.os))
        if built is not None and built != this
    ]
    return reasons


def _version_objection(variant: Variant, system: System) -> str | None:
    built, this = variant.version, system.version
    if built is None or built == this:
        return None
    shown = f"built for {variant.backend} {_dotted(built)}"
    if this is None:
        return f"{shown}, this torch is built without {system.backend}"
    # Only CUDA promises that what was built for an older minor version runs on a newer one; for
    # ROCm, oneAPI (xpu) and CANN the versions have to be the same.
    if variant.backend != "cuda" or built[0] != this[0]:
        return f"{shown}, this is {_dotted(this)}"
    return f"{shown}, newer than {_dotted(this)}" if built > this else None


def _arch(machine: str) -> str:
    return _ARCHS.get(machine.lower(), machine.lower())


def _dotted(release: Release) -> str:
    return f"{release[0]}.{release[1]}"


def _release(text: str | None) -> Release | None:
    """The first two numbers of a version such as ``2.13.0+cpu`` or ``7.1.25424-abc``."""
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _backend_version(device_type: str) -> Release | None:
    import torch

    if device_type == "cuda":
        return _release(torch.version.cuda)
    if device_type == "rocm":
        return _release(torch.version.hip)
    if device_type == "xpu":
        # The oneAPI compiler's date-like number: 20250302 is 2025.3.
        number = getattr(torch.version, "xpu", None) or ""
        return _release(f"{number[:4]}.{number[4:6]}")
    if device_type == "npu":
        try:
            collect_env = importlib.import_module("torch_npu.utils.collect_env")
        except ImportError:
            return None
        return _release(str(collect_env.get_cann_version()))
    return None
