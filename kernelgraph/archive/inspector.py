"""Looks at a saved program without loading it: its kernels, its ops, and whether it would load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernelgraph.archive.compatibility import release_problem
from kernelgraph.archive.container import Archive
from kernelgraph.archive.manifest import KernelOnDevice, Manifest, Op, ProgramKind
from kernelgraph.archive.supply import Supply
from kernelgraph.builds import System
from kernelgraph.hub import Hub
from kernelgraph.programs import Baked
from kernelgraph.selection import target_of

Row = dict[str, Any]
"""JSON by titles for people. The command prints it as a row of a table."""


@dataclass(frozen=True)
class Inspected:
    """A description of a saved program."""

    about: Row
    """The program as a whole."""
    kernels: list[Row]
    ops: list[Row]
    problems: list[str]
    """The reasons why it would not load here; empty if it would, as far as can be said without the
    Hub."""


def inspect(path: str | os.PathLike[str]) -> Inspected:
    """Describe a file that `kernelgraph.save` or `kernelgraph.aot_compile` wrote.

    Nothing of the file is run, and the Hub is not asked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it was not written by these functions, or was changed since.
    """
    with Archive(path) as archive:
        manifest = archive.manifest
        supply = Supply(manifest.kernels, archive.blobs, True, archive.source)
        exported = manifest.kind is ProgramKind.EXPORTED
        about = {
            "file": archive.source,
            "kind": "exported program" if exported else "AOTInductor package",
            "torch": manifest.torch,
            "kernelgraph": manifest.kernelgraph,
            "bytes": archive.path.stat().st_size,
            "bytes of weights": archive.size("data/weights/"),
            "bytes of kernels": archive.size("extra/kernelgraph/files/"),
            "bytes of references": archive.size("extra/kernelgraph/references/"),
        }
        kernels = [_kernel(baked, manifest, supply) for baked in manifest.kernels.values()]
        ops = [_op(op, manifest) for op in manifest.ops.values()]
        return Inspected(about, kernels, ops, list(_problems(manifest, supply)))


def _kernel(baked: Baked, manifest: Manifest, supply: Supply) -> Row:
    traced = [name for name, kernel in manifest.traced.items() if kernel.key == baked.key]
    return {
        "key": baked.key,
        "kernel": baked.repository,
        "commit" if baked.commit else "content": baked.revision,
        "in the file": sorted(supply.bundled(baked)),
        "uses": [key for _, key in baked.uses],
        "its own ops": [f"{namespace}::*" for namespace in traced],
    }


def _op(op: Op, manifest: Manifest) -> Row:
    return {
        "op": op.name,
        "layer": op.layer,
        "kernel": str(manifest.kernels[op.kernel]),
        "device": op.device,
        "schema": op.schema,
        "reference": op.replaceable,
        "calls": [{"path": path, "operands": list(operands)} for path, operands in op.calls],
    }


def _problems(manifest: Manifest, supply: Supply) -> Iterator[str]:
    compiled = manifest.kind is ProgramKind.COMPILED
    if problem := release_problem(manifest.torch, compiled=compiled):
        yield problem
    for kernel in manifest.traced.values():
        if problem := _kernel_problem(kernel, manifest, supply):
            yield problem
    ops = list(manifest.ops.values())
    for kernel in dict.fromkeys(op.kernel_on_device for op in ops):
        if problem := _kernel_problem(kernel, manifest, supply):
            replaceable = all(op.replaceable for op in ops if op.kernel == kernel.key)
            advice = ': load it with fallback="reference"' if replaceable and not compiled else ""
            yield problem + advice


def _kernel_problem(kernel: KernelOnDevice, manifest: Manifest, supply: Supply) -> str:
    """Return why a kernel is not available, by the names of its builds; empty if it may be."""
    baked, system = manifest.kernels[kernel.key], System.detect(target_of(kernel.device).type)
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
