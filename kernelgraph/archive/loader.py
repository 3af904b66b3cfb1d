"""Loading a program: its file, its kernels, and then its ops, in this order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from kernelgraph.archive.compatibility import release_problem, release_risk
from kernelgraph.archive.manifest import (
    Archive,
    Op,
    reference_file,
)
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
    Entry,
    Form,
    Installed,
    Nowhere,
    Reference,
    install,
    know_references,
    note_traced,
    noted_again,
    without_ops,
)
from kernelgraph.report import Decision, Reason, Report, publish
from kernelgraph.selection import Device, Mode, Selection, target_of


def load(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: Trust = False,
    local_files_only: bool = False,
    fallback: str = "error",
) -> ExportedProgram:
    """Load what `kernelgraph.save` wrote, and the kernels that are baked into it.

    The whole file is checked, then each kernel is had (from the file itself, or from the Hub at the
    commit that the program was exported with) and checked, and only then is any of them imported.
    `kernelgraph.last_report` says which kernel runs where.

    Args:
        path: The file.
        trust_remote_code: Whether the kernels' code may be run where the Hub does not call their
            owners trusted publishers: True, or a list of the repository ids that are trusted.
            Kernels that did not come from the Hub need True.
        local_files_only: Whether nothing may be asked of the Hub.
        fallback: What becomes of a kernel that is not to be had here, for want of a build that
            fits, say: ``error``; or ``reference``, to run what the layers do themselves. Not of
            one that is refused.

    Raises:
        TypeError: An argument is of the wrong type.
        FileNotFoundError: There is no such file, or a kernel has no build that fits.
        ValueError: There is no such ``fallback``; the file is not one of `kernelgraph.save`'s, or
            not as that wrote it; nobody vouches for a kernel, or it is not what the program says;
            a layer that has to be run itself could not be traced.
        OSError: The Hub could not be asked.
        ImportError: A kernel's own code failed, or a package that it needs is missing.
        RuntimeError: This torch cannot load the program.
    """
    with Loading(path, "program", trust_remote_code, local_files_only, fallback) as loading:
        missing = loading.install()
        try:
            program = torch.export.load(loading.archive.path)
        except Exception as error:
            raise loading.failed(error) from error
        if missing:
            program = without_ops(program, [(op, op.references) for op in missing])
        loading.report()
    return program


def aot_load(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: Trust = False,
    local_files_only: bool = False,
) -> Callable[..., Any]:
    """Load what `aot_compile` wrote: a callable with the arguments of the model.

    The file holds compiled code of its own, which is run whatever its kernels are.

    Args:
        path, trust_remote_code, local_files_only: As for `load`.

    Raises:
        TypeError, FileNotFoundError, ValueError, OSError, ImportError, RuntimeError: As for `load`.
    """
    with Loading(path, "aot", trust_remote_code, local_files_only, "error") as loading:
        loading.install()
        if risk := release_risk({op.device for op in loading.manifest.ops.values()}):
            warnings.warn(risk, RuntimeWarning, stacklevel=2)
        try:
            model = _torch.aot_load(loading.archive.path)
        except Exception as error:
            raise loading.failed(error) from error
        loading.report()
    return model


FALLBACKS = ("error", "reference")


class Loading:
    """One load: the file, and its kernels."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: str,
        trust_remote_code: Trust,
        local_files_only: bool,
        fallback: str,
    ) -> None:
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback is one of {', '.join(FALLBACKS)}, not {fallback!r}")
        trust = parse_trust(trust_remote_code)
        self.archive = Archive(path)
        self.manifest, self._source = self.archive.manifest, self.archive.source
        self._kernels, self._traced = self.manifest.kernels, self.manifest.traced
        self._supply = Supply(self._kernels, self.archive.blobs, trust, self._source)
        self._cache_alone = bool(local_files_only)
        self._fallback = fallback
        self._missing: dict[str, Exception] = {}
        """Why there is no kernel for an op."""
        if self.manifest.kind != kind:
            other = "aot_load" if kind == "program" else "load"
            raise ValueError(f"{self._source}: it is a file for kernelgraph.{other}")
        if why := release_problem(self.manifest.kind, self.manifest.torch):
            raise RuntimeError(f"{self._source}: {why}")

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.archive.__exit__(*exc)

    def install(self) -> list[Installed]:
        """Have the program's ops registered, with their kernels.

        Returns:
            The ops whose kernels are not to be had, and that their references are to replace.
        """
        ops = self.manifest.ops
        entries = {name: self._entry(op) for name, op in ops.items()}
        references = {name: self._references(op) for name, op in ops.items()}
        checked: dict[tuple[str, str], Checked | None] = {}
        with cache_only(self._cache_alone):
            for op in ops.values():
                if (op.kernel, op.device) not in checked:
                    checked[op.kernel, op.device] = self._check(op)
            own = {n: self._supply.check(k, target_of(d)) for n, (k, d) in self._traced.items()}
        # Nothing was imported yet, and now all that will be may be.
        for namespace, (key, device) in self._traced.items():
            import_checked(own[namespace])
            note_traced((key, *noted_again(self._kernels, key, own[namespace])), device)
        kernels = {n: self._import(op, checked[op.kernel, op.device]) for n, op in ops.items()}
        missing = []
        for name, op in ops.items():
            there = install(entries[name], kernels[name])
            more = [r for r in references[name] if r not in there.references]
            there.references, there.untraced = [*there.references, *more], op.untraced
            know_references(there)
            kernel = checked[op.kernel, op.device]
            if kernels[name] is None:
                missing.append(replace(there, references=references[name]))
            elif there.kernels is None and kernel is not None:
                found, here = noted_again(self._kernels, op.kernel, kernel)
                there.kernels = op.kernel, found, here
        return missing

    def _entry(self, op: Op) -> Entry:
        """What the op is made from, if that is what its name says."""
        baked = self._kernels[op.kernel]
        try:
            entry = Entry.of(op.form, Origin(baked.repository, baked.name, baked.revision, ""))
            Form.from_json(op.form)
            if (entry.name, entry.op) != (op.stem, op.name):
                raise ValueError("its form is not the one that its name was made from")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self._source}: op {op.name}: {error}") from error
        return entry

    def _references(self, op: Op) -> list[Reference]:
        try:
            return [
                Reference.from_json(noted, self.archive.extra(reference_file(op.name, number)))
                for number, noted in enumerate(op.references)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self._source}: a reference of op {op.name}: {error}") from error

    def _check(self, op: Op) -> Checked | None:
        try:
            return self._supply.check(op.kernel, target_of(op.device))
        except (OSError, ImportError, OtherDevice) as error:
            self._note_missing(op.kernel, error)
            return None

    def _import(self, op: Op, kernel: Checked | None) -> Kernel | None:
        if kernel is None:
            return None
        kind, name = op.form["take"]
        take = take_layer if kind == "layer_name" else take_function
        try:
            layer = take(import_checked(kernel), name, kernel.origin.repository)
        except ImportError as error:
            self._note_missing(op.kernel, error)
            return None
        check_hub_layer(layer, layer.forward, kernel.origin.repository)
        mode = Mode.TRAINING if op.form["training"] else Mode.INFERENCE
        return Kernel(layer, kernel.origin, Selection(Nowhere(layer), mode, Device(op.device)))

    def _note_missing(self, key: str, error: Exception) -> None:
        """Raise, unless references may take the places of a kernel's ops."""
        if self._fallback == "error":
            raise error
        for op in self.manifest.ops.values():
            if op.kernel != key:
                continue
            if op.untraced or not op.references:
                raise ValueError(
                    f"{self._source}: kernel {self._kernels[key]} is not to be had here, and layer "
                    f"{op.form['layer']} could not be traced to take its place "
                    f"({op.untraced}): {error}"
                ) from error
            self._missing[op.name] = error

    def failed(self, error: Exception) -> RuntimeError:
        """The error for a program that torch does not load."""
        return RuntimeError(
            f"{self._source}: torch {torch.__version__} cannot load this program of torch "
            f"{self.manifest.torch}: {type(error).__name__}: {error}"
        )

    def report(self) -> None:
        """Publish which kernel runs where."""
        decisions = []
        for name, op in self.manifest.ops.items():
            error = self._missing.get(name)
            reason = Reason.CANNOT_LOAD if error else Reason.KERNEL
            kernel = "" if error else f"{self._kernels[op.kernel]}: {op.form['take'][1]}"
            mode = str(Mode.TRAINING if op.form["training"] else Mode.INFERENCE)
            rest = (op.form["layer"], op.device, mode, reason, kernel, str(error or ""))
            qualname = "" if error else f"{NAMESPACE}::{name}"
            decisions += [Decision(path, *rest, qualname) for path, _ in op.calls]
        publish(Report("load", tuple(decisions)))
