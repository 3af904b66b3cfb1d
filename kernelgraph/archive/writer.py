"""Programs with kernels in them, as files: written, and loaded where nothing else of them is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kernelgraph._version import __version__
from kernelgraph.archive.manifest import (
    Manifest,
    Op,
    add_manifest,
    blob_file,
    reference_file,
    writing,
)
from kernelgraph.builds import Checked
from kernelgraph.graph import _torch
from kernelgraph.graph.ops import NAMESPACE, overload
from kernelgraph.hub import Hub
from kernelgraph.programs import (
    Baked,
    Installed,
    advise,
    blobs_of,
    every_build,
    installed,
    kernels_of,
    listed,
    namespaces_in,
    ops_in,
    traced,
)
from kernelgraph.selection import target_of

BUNDLES = (False, True, "all")


def save(
    program: ExportedProgram, path: str | os.PathLike[str], *, bundle: bool | str = False
) -> None:
    """``torch.export.save``, with what it takes to load the program where its kernels are not.

    The file is torch's own archive. Among its extra files is a manifest: for each op the kernel's
    repository, commit, layer and digests, and the op's schema, torch version and device; and the
    layers' own forwards, where they can be traced. `kernelgraph.load` loads it.

    Args:
        program: What `kernelgraph.export` or `kernelgraph.load` returned.
        path: The file to write, ``*.pt2``; it is replaced once the new one is whole.
        bundle: Whether the kernels' files are put into it, so that nothing needs to be fetched:
            True for the builds that are in use here, ``"all"`` for all that there are, which are
            downloaded.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no such ``bundle``; an op is not one of `kernelgraph.export`'s; its
            kernel comes from no repository; or a kernel's files have changed since it was loaded.
        OSError: The file could not be written, or a build could not be had from the Hub.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"save takes an ExportedProgram, not {type(program).__qualname__}")
    manifest, extra = _describe(program, "program", bundle)
    advise(program)  # who traced it anew, or changed it, may have lost this
    with writing(_checked_path(path)) as made:
        torch.export.save(program, made)
        add_manifest(made, manifest, extra)


# --- compiled ahead of time ---------------------------------------------------------------------


def aot_compile(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    bundle: bool | str = False,
    inductor_configs: Mapping[str, Any] | None = None,
) -> None:
    """Compile a program with AOTInductor, with what it takes to load it elsewhere.

    The kernels' ops are called by the compiled code, in a Python process: `kernelgraph.aot_load`
    loads it there.

    Args:
        program: What `kernelgraph.export` or `kernelgraph.load` returned.
        path: The package to write, ``*.pt2``.
        bundle: As for `save`.
        inductor_configs: As for ``torch._inductor.aoti_compile_and_package``.

    Raises:
        TypeError, ValueError, OSError: As for `save`.
        Exception: What Inductor raises.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"aot_compile takes an ExportedProgram, not {type(program).__qualname__}")
    manifest, extra = _describe(program, "aot", bundle)
    with writing(_checked_path(path)) as made:
        _torch.aot_compile(program, made, dict(inductor_configs or {}))
        add_manifest(made, manifest, extra)


# --- writing ------------------------------------------------------------------------------------


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked = Path(path)
    if checked.suffix != ".pt2":
        raise ValueError(f"a program is written to a file *.pt2, not {checked}")
    return checked.absolute()


def _describe(
    program: ExportedProgram, kind: str, bundle: bool | str
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a program, and the extra files that it speaks of."""
    if not any(bundle is known or bundle == known for known in BUNDLES):
        raise ValueError(f'bundle is False, True or "all", not {bundle!r}')
    calls: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name, node in ops_in(program):
        calls.setdefault(name, []).append(_call(node))
    ops, extra = {}, {}
    kernels: dict[str, Baked] = {}
    checked: dict[str, Checked] = {}
    for name, where in calls.items():
        there = installed().get(name)
        if there is None:
            raise ValueError(
                f"the program calls op {NAMESPACE}::{name}, which was not made by "
                "kernelgraph.export: export the model with that, and not with torch.export alone"
            )
        key = _kernels_of(there, kernels, checked)
        for number, reference in enumerate(there.references):
            extra[reference_file(name, number)] = reference.data
        noted = tuple(reference.to_json() for reference in there.references)
        schema = _torch.schema_text(overload(name))
        ops[name] = Op(
            name,
            key,
            there.entry.name,
            there.entry.form,
            noted,
            there.untraced,
            there.form.device,
            schema,
            tuple(where),
        )
    own = {}
    for namespace in sorted(namespaces_in(program) & traced().keys()):
        noted, device = traced()[namespace]
        own[namespace] = noted[0], device
        kernels.update(noted[1])
        checked.update(noted[2])
    hub = Hub()
    for key in kernels:
        kernels[key] = listed(kernels[key], hub)
        if bundle:
            kernels[key] = _bundle(kernels[key], checked[key], hub, extra, bundle == "all")
    return Manifest(kind, torch.__version__, __version__, ops, kernels, own), extra


def _call(node: torch.fx.Node) -> tuple[str, tuple[str, ...]]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].removeprefix("L['self'].") if stack else ""
    operands = []
    for argument in _torch.tree_leaves(node.args):
        value = argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            operands.append(f"{dtype}[{', '.join(map(str, value.shape))}]")
        else:
            operands.append(str(value))
    return path, tuple(operands)


def _kernels_of(there: Installed, kernels: dict[str, Baked], checked: dict[str, Checked]) -> str:
    """Add the kernel of an op, and those that it uses; its key."""
    noted = there.kernels
    if noted is None:
        assert there.kernel is not None
        kernel = there.kernel
        target = target_of(there.form.device)
        noted = kernels_of(kernel.origin, kernel.layer.__module__, target)
    kernels.update(noted[1])
    checked.update(noted[2])
    return noted[0]


def _bundle(baked: Baked, kernel: Checked, hub: Hub, extra: dict[str, bytes], every: bool) -> Baked:
    directories = {kernel.origin.variant: kernel.directory}
    if every:
        baked, directories = every_build(baked, kernel, hub)
    for variant, directory in directories.items():
        for sha256, content in blobs_of(baked.builds[variant], directory):
            extra[blob_file(sha256)] = content
    return baked
