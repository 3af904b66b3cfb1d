"""The requirements of a build, as its metadata states them: devices and Python packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kernelgraph.builds.metadata import Metadata

if TYPE_CHECKING:
    from kernelgraph.selection import Target


# --- devices ------------------------------------------------------------------------------------


class OtherDevice(ValueError):
    """A build was compiled for other devices."""


_CUDA_ARCH = re.compile(r"(\d{1,3})\.(\d)([af]?)(\+PTX)?", re.ASCII)


def check_archs(metadata: Metadata, target: Target, gfx: str | None = None) -> None:
    """Refuse a build that was compiled for other devices than ``target``.

    CUDA: code for 8.0 runs on 8.0 and later minor versions of 8; ``9.0a`` on 9.0 alone; ``10.0f``
    on its family, like code without a suffix; ``9.0+PTX`` is compiled when it is loaded, for
    anything newer. ROCm: the names have to be the same. An arch in an unknown notation refuses
    nothing, and an unknown device is not refused.

    Args:
        metadata: The build's metadata.
        target: The device that the build is wanted for.
        gfx: The device's ROCm architecture, such as ``gfx942``, where it is known.

    Raises:
        OtherDevice: The build excludes the device; the message names its archs and the device.
    """
    if not metadata.archs or metadata.backend != target.type:
        return
    device = None
    if target.type == "cuda" and target.capability is not None:
        capability = target.capability
        if not any(_cuda_arch_runs_on(arch, capability) for arch in metadata.archs):
            device = f"cuda {capability // 10}.{capability % 10}"
    if target.type == "rocm" and gfx is not None:
        # Features may follow a device's name (gfx90a:sramecc+:xnack-); archs do not state them.
        name = gfx.split(":")[0]
        if name not in {arch.split(":")[0] for arch in metadata.archs}:
            device = name
    if device is not None:
        raise OtherDevice(f"built for {', '.join(metadata.archs)}, and this device is {device}")


def _cuda_arch_runs_on(arch: str, capability: int) -> bool:
    parts = _CUDA_ARCH.fullmatch(arch)
    if parts is None:
        return True
    built = int(parts[1]) * 10 + int(parts[2])
    if parts[3] == "a":
        return built == capability
    if parts[4]:
        return built <= capability
    return built <= capability and built // 10 == capability // 10


def gfx_of(target: Target) -> str | None:
    """The ROCm architecture of the current device; None for other targets or where torch has none.

    The name may be followed by features: ``gfx90a:sramecc+:xnack-``.
    """
    if target.type != "rocm":
        return None
    import torch

    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return getattr(torch.cuda.get_device_properties(), "gcnArchName", None)


# --- Python packages ----------------------------------------------------------------------------


class _Package(NamedTuple):
    """A Python package that a kernel may need."""

    distribution: str
    module: str | None
    """The module that shows that the package is installed, if it has one."""


# The packages that builds for the Hub may depend on, by backend and by the names that
# ``python-depends`` has for them. The first entry is for every backend.
_PACKAGES = {
    "": {
        "einops": _Package("einops", "einops"),
        "helion": _Package("helion", "helion"),
        "tvm-ffi": _Package("apache-tvm-ffi", "tvm_ffi"),
    },
    "cuda": {"nvidia-cutlass-dsl": _Package("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": _Package("nki", "nki")},
    "xpu": {"onednn": _Package("onednn-devel", None)},
}


def check_python_depends(requirements: Iterable[str], backend: str) -> None:
    """Refuse a kernel that needs a package that is not installed, or one that no kernel may need.

    Args:
        requirements: Names of packages, each with or without a version specifier.
        backend: The device type that the kernel is for.

    Raises:
        ValueError: A requirement is malformed, or not one that a kernel may have.
        ImportError: A package is not installed, or not in that version; the message says how to
            install it.
    """
    allowed = _PACKAGES[""] | _PACKAGES.get(backend, {})
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(f"python-depends: {text!r} is no requirement: {error}") from error
        package = allowed.get(canonicalize_name(requirement.name))
        if package is None:
            raise ValueError(
                f"python-depends: {text!r} is no package that a kernel may need; "
                f"there are {', '.join(sorted(allowed))}"
            )
        _check_installed(requirement, package)


def _check_installed(needed: Requirement, package: _Package) -> None:
    if package.module is not None and importlib.util.find_spec(package.module) is None:
        raise _missing(needed, package, "it is not installed")
    if needed.specifier:
        try:
            version = importlib.metadata.version(package.distribution)
        except importlib.metadata.PackageNotFoundError:
            return  # the module can be imported, but its version is unknown
        if not needed.specifier.contains(version, prereleases=True):
            raise _missing(needed, package, f"{version} is installed")


def _missing(needed: Requirement, package: _Package, reason: str) -> ImportError:
    install = f"{package.distribution}{needed.specifier}"
    return ImportError(f'the kernel needs {needed}, and {reason}: pip install "{install}"')
