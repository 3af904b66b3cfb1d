"""Loads a saved program.

`load` and `aot_load` run the same steps, which are methods of `Loading`:

1. Read the archive, and check each part of it against the manifest (`Archive`).
2. Check that the ops' names follow from their signatures, and decode their references.
3. Obtain the kernels, and check all of their files (`Supply`). Nothing of them is imported.
4. Import the kernels.
5. Register the ops. Those without a kernel are noted, for references to replace.
6. Let torch load the program, and publish a report.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.export import ExportedProgram

from kernelgraph.archive.compatibility import release_problem, release_risk
from kernelgraph.archive.container import Archive, reference_file
from kernelgraph.archive.manifest import KernelOnDevice, Op, ProgramKind
from kernelgraph.archive.supply import Supply
from kernelgraph.builds import (
    Checked,
    Origin,
    OtherDevice,
    import_checked,
    take_function,
    take_layer,
)
from kernelgraph.graph import _torch
from kernelgraph.graph.ops import NAMESPACE
from kernelgraph.hub import Trust, cache_only, parse_trust
from kernelgraph.kernel import Kernel
from kernelgraph.layers import check_hub_layer
from kernelgraph.programs import (
    InstalledOp,
    LoadedLayer,
    ProgramOp,
    ProgramOpSpec,
    Reference,
    install,
    record_again,
    record_traced,
    replace_with_references,
    use_references,
)
from kernelgraph.report import Decision, Reason, Report, publish
from kernelgraph.selection import Device, Selection, target_of

T = TypeVar("T")

FALLBACKS = ("error", "reference")


def load(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: Trust = False,
    local_files_only: bool = False,
    fallback: str = "error",
) -> ExportedProgram:
    """Load a program that `kernelgraph.save` wrote, and the kernels that it calls.

    First the whole file is checked. Then each kernel is obtained, from the file itself or from the
    Hub at the commit that the program was exported with, and checked. Only then is any of them
    imported. `kernelgraph.last_report` tells which kernel runs where.

    Args:
        path: The file.
        trust_remote_code: Whether to run the code of kernels whose owners the Hub does not call
            trusted publishers: True, or a list of the repository ids that you trust. Kernels that
            did not come from the Hub need True.
        local_files_only: Whether to send no request to the Hub.
        fallback: What to do about a kernel that is not available here, for example because no build
            fits: ``error``, raise an error; ``reference``, run the layer's own computation. A
            kernel that is refused is always an error.

    Returns:
        The program, as ``torch.export.load`` returns it.

    Raises:
        TypeError: If an argument is of the wrong type.
        FileNotFoundError: If there is no such file, or a kernel has no build that fits.
        ValueError: If there is no such ``fallback``; the file was not written by
            `kernelgraph.save`, or was changed since; nobody vouches for a kernel, or it differs
            from what the program says; or the layer of a missing kernel could not be traced.
        OSError: If the Hub could not be asked.
        ImportError: If a kernel's own code failed, or a package that it needs is missing.
        RuntimeError: If this torch cannot load the program.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> model, x = torch.nn.Sequential(SiluAndMul()), torch.randn(2, 16)
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     kg.save(kg.export(model, (x,), mode=kg.Mode.INFERENCE), "model.pt2", bundle=True)
        >>> program = kg.load("model.pt2", trust_remote_code=True)  # in another process, say
        >>> [decision.path for decision in kg.last_report().kernels]
        ['0']
        >>> program.module()(x).shape
        torch.Size([2, 8])
    """
    kind = ProgramKind.EXPORTED
    # The steps are in the module's docstring. 1 is the constructor's, 2 to 5 are those of install.
    with Loading(path, kind, trust_remote_code, local_files_only, fallback) as loading:
        missing = loading.install()
        program = loading.load_with(torch.export.load)
        if missing:
            program = replace_with_references(program, [(op, op.references) for op in missing])
        loading.report()
    return program


def aot_load(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: Trust = False,
    local_files_only: bool = False,
) -> Callable[..., Any]:
    """Load a package that `kernelgraph.aot_compile` wrote, and the kernels that it calls.

    The package also holds compiled code of its own, which no check of trust covers.

    Args:
        path: The package.
        trust_remote_code: As for `kernelgraph.load`.
        local_files_only: As for `kernelgraph.load`.

    Returns:
        A callable with the arguments of the model.

    Raises:
        TypeError, FileNotFoundError, ValueError, OSError, ImportError, RuntimeError: As for
            `kernelgraph.load`.

    Example::

        compiled = kg.aot_load("package.pt2", trust_remote_code=True)
        compiled(x)
    """
    kind = ProgramKind.COMPILED
    with Loading(path, kind, trust_remote_code, local_files_only, "error") as loading:
        loading.install()
        if risk := release_risk({op.device for op in loading.manifest.ops.values()}):
            warnings.warn(risk, RuntimeWarning, stacklevel=2)
        model = loading.load_with(_torch.aot_load)
        loading.report()
    return model


# --- the steps ----------------------------------------------------------------------------------


class _Signature(NamedTuple):
    """The parts of an op that are in the file: all but its kernel."""

    op: ProgramOp
    references: list[Reference]


class _Found(NamedTuple):
    """The program's kernels on this machine, checked."""

    of_ops: Mapping[KernelOnDevice, Checked | None]
    """The kernels that ops call; None where references are to replace the ops."""
    traced: Mapping[str, Checked]
    """The kernels whose own ops are in the program, by the namespace of these ops."""


class Loading:
    """One load of a saved program: its file, its kernels and its ops.

    Args:
        path: The file.
        kind: The kind of program that is expected.
        trust_remote_code: See `load`.
        local_files_only: See `load`.
        fallback: See `load`.

    Raises:
        TypeError, FileNotFoundError, ValueError, RuntimeError: As for `load`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: ProgramKind,
        trust_remote_code: Trust,
        local_files_only: bool,
        fallback: str,
    ) -> None:
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback is one of {', '.join(FALLBACKS)}, not {fallback!r}")
        trust = parse_trust(trust_remote_code)
        self._archive = Archive(path)
        self.manifest, self._source = self._archive.manifest, self._archive.source
        self._kernels = self.manifest.kernels
        self._supply = Supply(self._kernels, self._archive.blobs, trust, self._source)
        self._local_files_only = bool(local_files_only)
        self._references_allowed = fallback == "reference"
        self._missing: dict[str, Exception] = {}
        """The error for each op without a kernel, by the op's name."""
        if self.manifest.kind is not kind:
            other = "aot_load" if kind is ProgramKind.EXPORTED else "load"
            raise ValueError(f"{self._source}: it is a file for kernelgraph.{other}")
        compiled = kind is ProgramKind.COMPILED
        if problem := release_problem(self.manifest.torch, compiled=compiled):
            raise RuntimeError(f"{self._source}: {problem}")

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exc: object) -> None:
        self._archive.__exit__(*exc)

    def install(self) -> list[InstalledOp]:
        """Register the program's ops with their kernels.

        Returns:
            The ops whose kernels are not available here, for references to replace.
        """
        # 2. Check the ops.
        signatures = {name: self._check_op(op) for name, op in self.manifest.ops.items()}
        # 3. Obtain the kernels and check their files.
        found = self._obtain()
        # 4. Import the kernels: now that all are checked, none before.
        kernels = self._import(found)
        # 5. Register the ops.
        return self._register(signatures, found, kernels)

    def load_with(self, torch_load: Callable[[Path], T]) -> T:
        """Return what ``torch_load`` makes of the file.

        Raises:
            RuntimeError: If it raises an error.
        """
        try:
            return torch_load(self._archive.path)
        except Exception as error:
            raise RuntimeError(
                f"{self._source}: torch {torch.__version__} cannot load this program of torch "
                f"{self.manifest.torch}: {type(error).__name__}: {error}"
            ) from error

    def report(self) -> None:
        """Publish which kernel runs where."""
        decisions = []
        for name, op in self.manifest.ops.items():
            error = self._missing.get(name)
            reason = Reason.CANNOT_LOAD if error else Reason.KERNEL
            kernel = "" if error else f"{self._kernels[op.kernel]}: {op.member.name}"
            qualname = "" if error else f"{NAMESPACE}::{name}"
            rest = (op.layer, op.device, str(op.mode), reason, kernel, str(error or ""), qualname)
            decisions += [Decision(call.path, *rest) for call in op.calls]
        publish(Report("load", tuple(decisions)))

    # --- checking the ops -----------------------------------------------------------------------

    def _check_op(self, op: Op) -> _Signature:
        """Return what an op is made from, if its name says the same."""
        return _Signature(self._program_op(op), self._references(op))

    def _program_op(self, op: Op) -> ProgramOp:
        baked = self._kernels[op.kernel]
        try:
            made = ProgramOp.of(op.form, Origin(baked.repository, baked.name, baked.revision, ""))
            ProgramOpSpec.from_json(op.form)
            if (made.stem, made.name) != (op.stem, op.name):
                raise ValueError("its form is not the one that its name was made from")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self._source}: op {op.name}: {error}") from error
        return made

    def _references(self, op: Op) -> list[Reference]:
        try:
            return [
                Reference.from_json(noted, self._archive.extra(reference_file(op.name, number)))
                for number, noted in enumerate(op.references)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self._source}: a reference of op {op.name}: {error}") from error

    # --- obtaining the kernels ------------------------------------------------------------------

    def _obtain(self) -> _Found:
        of_ops: dict[KernelOnDevice, Checked | None] = {}
        with cache_only(self._local_files_only):
            for op in self.manifest.ops.values():
                if op.kernel_on_device not in of_ops:
                    of_ops[op.kernel_on_device] = self._obtain_for(op)
            traced = {
                namespace: self._supply.obtain(kernel.key, target_of(kernel.device))
                for namespace, kernel in self.manifest.traced.items()
            }
        return _Found(of_ops, traced)

    def _obtain_for(self, op: Op) -> Checked | None:
        try:
            return self._supply.obtain(op.kernel, target_of(op.device))
        except (OSError, ImportError, OtherDevice) as error:
            self._note_missing(op.kernel, error)
            return None

    def _note_missing(self, key: str, error: Exception) -> None:
        """Raise an error, unless references may replace all ops of a kernel."""
        if not self._references_allowed:
            raise error
        for op in self.manifest.ops.values():
            if op.kernel != key:
                continue
            if not op.replaceable:
                raise ValueError(
                    f"{self._source}: kernel {self._kernels[key]} is not available here, and layer "
                    f"{op.layer} could not be traced to take its place ({op.untraced}): {error}"
                ) from error
            self._missing[op.name] = error

    # --- importing them -------------------------------------------------------------------------

    def _import(self, found: _Found) -> dict[str, Kernel | None]:
        """Import the kernels, and return the one of each op."""
        for namespace, (key, device) in self.manifest.traced.items():
            checked = found.traced[namespace]
            import_checked(checked)
            record_traced(record_again(self._kernels, key, checked), device)
        ops = self.manifest.ops.items()
        return {name: self._import_for(op, found.of_ops[op.kernel_on_device]) for name, op in ops}

    def _import_for(self, op: Op, checked: Checked | None) -> Kernel | None:
        if checked is None:
            return None
        kind, name = op.member
        take = take_layer if kind == "layer_name" else take_function
        repository = checked.origin.repository
        try:
            layer = take(import_checked(checked), name, repository)
        except ImportError as error:
            self._note_missing(op.kernel, error)
            return None
        check_hub_layer(layer, layer.forward, repository)
        return Kernel(
            layer, checked.origin, Selection(LoadedLayer(layer), op.mode, Device(op.device))
        )

    # --- registering the ops --------------------------------------------------------------------

    def _register(
        self,
        signatures: Mapping[str, _Signature],
        found: _Found,
        kernels: Mapping[str, Kernel | None],
    ) -> list[InstalledOp]:
        """Register the ops, and return those without a kernel."""
        missing = []
        for name, op in self.manifest.ops.items():
            program_op, references = signatures[name]
            installed = install(program_op, kernels[name])
            more = [r for r in references if r not in installed.references]
            installed.references, installed.untraced = [*installed.references, *more], op.untraced
            use_references(installed)
            checked = found.of_ops[op.kernel_on_device]
            if kernels[name] is None:
                missing.append(replace(installed, references=references))
            elif installed.records is None and checked is not None:
                installed.records = record_again(self._kernels, op.kernel, checked)
        return missing
