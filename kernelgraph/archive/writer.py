"""Saves a program with a description of its kernels, and with the kernels' files if asked to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from kernelgraph import _version
from kernelgraph.archive.container import add_manifest, blob_file, reference_file, replacing
from kernelgraph.archive.manifest import KernelOnDevice, Manifest, Op, ProgramKind, RecordedCall
from kernelgraph.builds import Checked
from kernelgraph.graph import _torch
from kernelgraph.graph.ops import NAMESPACE, overload
from kernelgraph.hub import Hub
from kernelgraph.programs import (
    Baked,
    InstalledOp,
    KernelRecords,
    add_advice,
    blobs_of,
    installed_ops,
    namespaces_in,
    ops_in,
    record_kernel,
    traced_kernels,
    with_every_build,
    with_listing,
)
from kernelgraph.selection import target_of

BUNDLES = (False, True, "all")


def save(
    program: ExportedProgram, path: str | os.PathLike[str], *, bundle: bool | str = False
) -> None:
    """Save a program so that `kernelgraph.load` can load it without the model's code.

    The file is what ``torch.export.save`` writes, with more extra files. One is a manifest, which
    has for each op the kernel's repository, commit, layer and digests, and the op's schema, torch
    version and device. Others are the layers' own forwards, where they can be traced.

    Args:
        program: A program that `kernelgraph.export` or `kernelgraph.load` returned.
        path: The file to write, ``*.pt2``. An old file is replaced once the new one is whole.
        bundle: Whether to put the kernels' files into it, so that nothing has to be downloaded:
            True for the builds that are in use here; ``"all"`` for all builds, which are
            downloaded now.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no such ``bundle``; ``path`` is no ``*.pt2``; an op was not made by
            `kernelgraph.export`; its kernel comes from no repository; or a kernel's files have
            changed since it was loaded.
        OSError: If the file could not be written, or a build not be downloaded.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> model, x = torch.nn.Sequential(SiluAndMul()), torch.randn(2, 16)
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     program = kg.export(model, (x,), mode=kg.Mode.INFERENCE)
        >>> kg.save(program, "model.pt2", bundle=True)
        >>> loaded = kg.load("model.pt2", trust_remote_code=True)
        >>> torch.testing.assert_close(loaded.module()(x), model(x))
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"save takes an ExportedProgram, not {type(program).__qualname__}")
    manifest, extra = _describe(program, ProgramKind.EXPORTED, bundle)
    add_advice(program)  # the program may have been traced again, or changed, and lost this
    with replacing(_checked_path(path)) as made:
        torch.export.save(program, made)
        add_manifest(made, manifest, extra)


def aot_compile(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    bundle: bool | str = False,
    inductor_configs: Mapping[str, object] | None = None,
) -> None:
    """Compile a program with AOTInductor so that `kernelgraph.aot_load` can load it.

    The compiled code calls the kernels as ops, and so needs a Python process.

    Args:
        program: A program that `kernelgraph.export` or `kernelgraph.load` returned.
        path: The package to write, ``*.pt2``. An old one is replaced once the new one is whole.
        bundle: As for `kernelgraph.save`.
        inductor_configs: As for ``torch._inductor.aoti_compile_and_package``.

    Raises:
        TypeError, ValueError, OSError: As for `kernelgraph.save`.
        Exception: What Inductor raises.

    Example::

        program = kg.export(model, (x,), mode=kg.Mode.INFERENCE)
        kg.aot_compile(program, "package.pt2", bundle=True)
        compiled = kg.aot_load("package.pt2", trust_remote_code=True)  # in another process, say
        compiled(x)
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"aot_compile takes an ExportedProgram, not {type(program).__qualname__}")
    manifest, extra = _describe(program, ProgramKind.COMPILED, bundle)
    with replacing(_checked_path(path)) as made:
        _torch.aot_compile(program, made, dict(inductor_configs or {}))
        add_manifest(made, manifest, extra)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked = Path(path)
    if checked.suffix != ".pt2":
        raise ValueError(f"a program is written to a file *.pt2, not {checked}")
    return checked.absolute()


# --- the manifest -------------------------------------------------------------------------------


@dataclass
class _Kernels:
    """The kernels of a program, by key, as they are collected from its ops."""

    baked: dict[str, Baked] = field(default_factory=dict)
    """For the manifest."""
    checked: dict[str, Checked] = field(default_factory=dict)
    """On this machine."""

    def add(self, records: KernelRecords) -> None:
        """Add a kernel and those that it uses."""
        self.baked.update(records.baked)
        self.checked.update(records.checked)


def _describe(
    program: ExportedProgram, kind: ProgramKind, bundle: bool | str
) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest of a program, and the extra files that it refers to."""
    if bundle not in BUNDLES:
        raise ValueError(f'bundle is False, True or "all", not {bundle!r}')
    kernels = _Kernels()
    extra: dict[str, bytes] = {}
    # The ops of this package, with their kernels and references.
    calls: dict[str, list[RecordedCall]] = {}
    for name, node in ops_in(program):
        calls.setdefault(name, []).append(_recorded(node))
    ops = {name: _op(name, where, kernels, extra) for name, where in calls.items()}
    # The kernels that were traced, so that their own ops are in the program.
    own = {}
    for namespace in sorted(namespaces_in(program) & traced_kernels().keys()):
        records, device = traced_kernels()[namespace]
        own[namespace] = KernelOnDevice(records.key, device)
        kernels.add(records)
    # What the Hub lists for each kernel; and its files, if they are to be in the program's file.
    hub = Hub()
    for key in kernels.baked:
        kernels.baked[key] = with_listing(kernels.baked[key], hub)
        if bundle:
            kernels.baked[key] = _bundle(key, kernels, hub, extra, every=bundle == "all")
    return Manifest(kind, torch.__version__, _version.__version__, ops, kernels.baked, own), extra


def _op(name: str, calls: Sequence[RecordedCall], kernels: _Kernels, extra: dict[str, bytes]) -> Op:
    """Describe an op; add its kernel to ``kernels`` and its references to ``extra``."""
    op = installed_ops().get(name)
    if op is None:
        raise ValueError(
            f"the program calls op {NAMESPACE}::{name}, which was not made by "
            "kernelgraph.export: export the model with that, and not with torch.export alone"
        )
    records = op.records or _records_of(op)
    kernels.add(records)
    for number, reference in enumerate(op.references):
        extra[reference_file(name, number)] = reference.data
    return Op(
        name,
        records.key,
        op.op.stem,
        op.op.spec,
        tuple(reference.to_json() for reference in op.references),
        op.untraced,
        op.spec.device,
        _torch.schema_text(overload(name)),
        tuple(calls),
    )


def _records_of(op: InstalledOp) -> KernelRecords:
    """Describe the kernel of an op that was exported in this process."""
    kernel = op.kernel
    assert kernel is not None
    return record_kernel(kernel.origin, kernel.layer.__module__, target_of(op.spec.device))


def _recorded(node: fx.Node) -> RecordedCall:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("L['self'].") if stack else ""
    operands = []
    for argument in _torch.tree_leaves(node.args):
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            operands.append(f"{dtype}[{', '.join(map(str, value.shape))}]")
        else:
            operands.append(str(value))
    return RecordedCall(path, tuple(operands))


def _bundle(
    key: str, kernels: _Kernels, hub: Hub, extra: dict[str, bytes], *, every: bool
) -> Baked:
    """Add the files of a kernel to ``extra``; return the kernel with the builds that these are."""
    baked, checked = kernels.baked[key], kernels.checked[key]
    directories = {checked.origin.variant: checked.directory}
    if every:
        baked, directories = with_every_build(baked, checked, hub)
    for variant, directory in directories.items():
        for sha256, content in blobs_of(baked.builds[variant], directory):
            extra[blob_file(sha256)] = content
    return baked
