"""The Python packages that a kernel may need, by the names that ``python-depends`` has for them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# What builds for the Hub may depend on: the distribution, and the module that shows that it is
# installed, if it has one. First those of every backend.
_PACKAGES: dict[str, dict[str, tuple[str, str | None]]] = {
    "": {
        "einops": ("einops", "einops"),
        "helion": ("helion", "helion"),
        "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
    },
    "cuda": {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": ("nki", "nki")},
    "xpu": {"onednn": ("onednn-devel", None)},
}


def check_python_depends(requirements: Iterable[str], backend: str) -> None:
    """Refuse a kernel that needs a package that is not installed, or is none that it may need.

    Args:
        requirements: Names of packages, each with or without a version specifier.
        backend: The device type that the kernel is for.

    Raises:
        ValueError: A requirement is malformed, or not one that a kernel may have.
        ImportError: A package is not installed, or not in that version; the message says how to
            install it.
    """
    known = _PACKAGES[""] | _PACKAGES.get(backend, {})
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(f"python-depends: {text!r} is no requirement: {error}") from error
        name = canonicalize_name(requirement.name)
        if name not in known:
            there = ", ".join(sorted(known))
            raise ValueError(
                f"python-depends: {text!r} is no package that a kernel may need; there are {there}"
            )
        distribution, module = known[name]
        if module is not None and importlib.util.find_spec(module) is None:
            raise _missing(requirement, distribution, "it is not installed")
        if requirement.specifier:
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue  # importable, but nobody knows in which version
            if not requirement.specifier.contains(version, prereleases=True):
                raise _missing(requirement, distribution, f"{version} is installed")


def _missing(needed: Requirement, distribution: str, why: str) -> ImportError:
    install = f"{distribution}{needed.specifier}"
    return ImportError(f'the kernel needs {needed}, and {why}: pip install "{install}"')
