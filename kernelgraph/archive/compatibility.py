"""Checks whether this version of torch can load a program that another version made."""

from __future__ import annotations

from collections.abc import Collection

from kernelgraph.builds import Release


def release_of(version: str) -> Release:
    """Return the release that a version of torch belongs to: 2.13 for ``2.13.0+cpu``.

    Raises:
        ValueError: If it is no version of torch.
    """
    try:
        major, minor = map(int, version.split(".")[:2])
    except (ValueError, AttributeError):
        raise ValueError(f"{version!r} is no version of torch") from None
    return major, minor


def release_problem(made_with: str, *, compiled: bool) -> str:
    """Return why this torch cannot load a program of another version; empty if it can.

    torch loads what an older version has exported. Compiled code needs the libraries of the release
    that compiled it.

    Args:
        made_with: The version of torch that made the program.
        compiled: Whether the program is compiled ahead of time.
    """
    import torch

    here, made = release_of(torch.__version__), release_of(made_with)
    versions = f"it was made with torch {made_with}, and this is torch {torch.__version__}"
    if compiled and here != made:
        return (
            f"{versions}: compiled code runs with the same release alone; compile the program here"
        )
    if here < made:
        needed = f"{made[0]}.{made[1]}"
        return (
            f"{versions}: load it with torch {needed} or newer, or export the model with this one"
        )
    return ""


def release_risk(devices: Collection[str]) -> str:
    """Return a warning about loading compiled code with ops for ``devices``; empty if there is
    no risk.

    torch 2.11 for CUDA ended in a segmentation fault there, for any package that calls an op
    written in Python, with or without a kernel of ours. No error can be raised at that point.
    """
    import torch

    if release_of(torch.__version__) >= (2, 12) or "cuda" not in devices:
        return ""
    return (
        f"torch {torch.__version__} may end this process with a segmentation fault as it loads a "
        "package of AOTInductor that calls ops on CUDA: if it does, load the program that "
        "kernelgraph.save writes, or use a newer torch"
    )
