"""Looking at a saved program without loading it: what is baked in, and would it run here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernelgraph.archive.manifest import Archive, Manifest, Op
from kernelgraph.archive.supply import Supply
from kernelgraph.builds import System
from kernelgraph.hub import Hub
from kernelgraph.programs import Baked
from kernelgraph.selection import Target, target_of


@dataclass(frozen=True)
class Inspected:
    """What there is to say of a saved program."""

    about: dict[str, Any]
    """The program as a whole."""
    kernels: list[dict[str, Any]]
    ops: list[dict[str, Any]]
    problems: list[str]
    """Why it would not load here; empty where it would, as far as can be told without the Hub."""


def inspect(path: str | os.PathLike[str]) -> Inspected:
    """Look at what `kernelgraph.save` or `kernelgraph.aot_compile` wrote; nothing of it is run,
    and nothing is asked of the Hub.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or not as it was written.
    """
    with Archive(path) as archive:
        manifest = archive.manifest
        supply = Supply(manifest.kernels, archive.blobs, True, archive.source)
        about = {
            "file": archive.source,
            "kind": "exported program" if manifest.kind == "program" else "AOTInductor package",
            "torch": manifest.torch,
            "kernelgraph": manifest.kernelgraph,
            "bytes": archive.path.stat().st_size,
            "bytes of weights": archive.size("data/weights/"),
            "bytes of kernels": archive.size("extra/kernelgraph/files/"),
            "bytes of references": archive.size("extra/kernelgraph/references/"),
        }
        kernels = [_kernel(baked, supply) for baked in manifest.kernels.values()]
        for kernel in kernels:
            traced = [name for name, (key, _) in manifest.traced.items() if key == kernel["key"]]
            kernel["its own ops"] = [f"{name}::*" for name in traced]
        ops = [_op(op, manifest) for op in manifest.ops.values()]
        return Inspected(about, kernels, ops, list(_problems(manifest, supply)))


def _kernel(baked: Baked, supply: Supply) -> dict[str, Any]:
    return {
        "key": baked.key,
        "kernel": baked.repository,
        "commit" if baked.commit else "content": baked.revision,
        "in the file": sorted(supply.bundled(baked)),
        "uses": [key for _, key in baked.uses],
    }


def _op(op: Op, manifest: Manifest) -> dict[str, Any]:
    return {
        "op": op.name,
        "layer": op.form["layer"],
        "kernel": str(manifest.kernels[op.kernel]),
        "device": op.device,
        "schema": op.schema,
        "reference": not op.untraced and bool(op.references),
        "calls": [{"path": path, "operands": list(operands)} for path, operands in op.calls],
    }


def _problems(manifest: Manifest, supply: Supply) -> Iterator[str]:
    from kernelgraph.archive.compatibility import release_problem

    if why := release_problem(manifest.kind, manifest.torch):
        yield why
    for key, device in manifest.traced.values():
        if why := _kernel_problem(manifest.kernels[key], target_of(device), supply):
            yield why
    seen = set()
    for op in manifest.ops.values():
        if (op.kernel, op.device) not in seen:
            seen.add((op.kernel, op.device))
            baked, target = manifest.kernels[op.kernel], target_of(op.device)
            if why := _kernel_problem(baked, target, supply):
                traced = all(
                    other.references and not other.untraced
                    for other in manifest.ops.values()
                    if other.kernel == op.kernel
                )
                can = traced and manifest.kind == "program"
                yield why + (': load it with fallback="reference"' if can else "")


def _kernel_problem(baked: Baked, target: Target, supply: Supply) -> str:
    """Why a kernel is not to be had, by the names of its builds; empty where it may be."""
    system = System.detect(target.type)
    if supply.fits(baked, system):
        return ""
    if baked.commit is None:
        if supply.on_disk(baked, system):
            return ""
        return f"kernel {baked} has no build that fits, in the file or on this machine's disk"
    if baked.digests and not supply.fits(baked, system, listed=True):
        return f"kernel {baked} has no build that fits this system ({system})"
    if Hub().offline:
        return f"kernel {baked} has no build in the file that fits, and the Hub may not be asked"
    return ""
