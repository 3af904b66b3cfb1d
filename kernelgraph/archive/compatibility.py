"""Which torch can load a program that another torch has made."""

from __future__ import annotations

from collections.abc import Collection

from kernelgraph.builds import Release


def release_of(version: str) -> Release:
    """The release of a torch version.

    Raises:
        ValueError: It is no version of torch's.
    """
    try:
        major, minor = map(int, version.split(".")[:2])
    except (ValueError, AttributeError):
        raise ValueError(f"{version!r} is no version of torch") from None
    return major, minor


def release_problem(kind: str, made_with: str) -> str:
    """Why this torch cannot load a program, by its version; empty where it can.

    torch loads what an older one has exported. Compiled code holds to what the torch that compiled
    it has in its libraries.

    Args:
        kind: ``program``, or ``aot`` where it is compiled.
        made_with: The version of torch that it was made with.
    """
    import torch

    here, made = release_of(torch.__version__), release_of(made_with)
    said = f"it was made with torch {made_with}, and this is torch {torch.__version__}"
    if kind == "aot" and here != made:
        return f"{said}: compiled code runs with the same release alone; compile the program here"
    if here < made:
        needed = f"{made[0]}.{made[1]}"
        return f"{said}: load it with torch {needed} or newer, or export the model with this one"
    return ""


def release_risk(devices: Collection[str]) -> str:
    """What to know before compiled code with ops for such devices is loaded; empty if nothing.

    torch 2.11 for CUDA was seen to die of a segmentation fault in it, of a plain package with an
    op written in Python as much as of ours: no error can be raised then.
    """
    import torch

    if release_of(torch.__version__) >= (2, 12) or "cuda" not in devices:
        return ""
    return (
        f"torch {torch.__version__} may end this process with a segmentation fault as it loads a "
        "package of AOTInductor that calls ops on CUDA: if it does, load the program that "
        "kernelgraph.save writes, or use a newer torch"
    )
