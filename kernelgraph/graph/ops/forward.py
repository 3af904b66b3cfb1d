"""What the op of one form of call does: run the kernel, with results as a graph needs them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, UnsupportedValue, flatten_tensors
from kernelgraph.graph.infer import (
    Effects,
    OutputSpec,
    ShapeFunction,
    Source,
    check_unwritten,
    contiguous_copy,
    make_fakes,
    owned,
    reach,
    versions,
)
from kernelgraph.graph.ops.fast_path import Known, steady_state
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible


class Body:
    """The functions behind the op of one form of call.

    Args:
        kernel: Runs in `forward`.
        layer: The layer that is called.
        call: The form of the call.
        shapes: Tells the shapes of a call.
        told: Of one such call: all have results of these dtypes, devices and ranks.
        effects: The operands that kernel and layer write into.
    """

    differentiable = False
    """Whether the results go through autograd, which wants no views."""

    forward: Callable[..., Any]
    """The op: the kernel, below autograd. Its results own their memory, and are contiguous and of
    the shapes that `fake` says."""

    def __init__(
        self,
        kernel: Kernel,
        layer: Extensible,
        call: Call,
        shapes: Source,
        told: OutputSpec,
        effects: Effects,
    ) -> None:
        self.places = Places()
        self.returned = effects.layer
        """The operands whose contents after the call are results too, behind the others."""
        self.count = len(told.results) + len(self.returned)
        """How many results there are that a gradient may come for."""
        self._kernel = kernel
        self._layer = layer
        self._call = call
        self._shapes = ShapeFunction(shapes)
        self._run_kernel = Runner(kernel.forward, call)
        self._output = told.output
        self._expected = [(r.dtype, r.device.type, len(r.shape)) for r in told.results]
        self._copied = {*effects.kernel, *effects.layer}
        # Of the copies the kernel may return what it likes.
        self._lent = [i for i in call.tensors if i not in self._copied]
        self._known: dict[Any, Known] = {}
        self.forward = self._copying if self._copied else self._steady_state()

    @property
    def returns(self) -> int:
        """How many results the op has in all."""
        return self.count

    # --- the forward op -----------------------------------------------------------------

    def _steady_state(self) -> Callable[..., Any]:
        return steady_state(
            self._run_kernel,
            self._output,
            [dtype for dtype, _, _ in self._expected],
            self._lent,
            differentiable=self.differentiable,
            table=self._known,
            checked=self._checked,
            fitted=self._fitted,
            failed=self._fail,
        )

    def _checked(self, form: Any, operands: tuple[Any, ...]) -> Any:
        """The first call with operands of some sizes: all is checked that a kernel can do wrong."""
        before = versions(operands)
        try:
            result = self._run_kernel(operands)
        except Exception as error:
            self._fail(error, operands)
        who = f"kernel {self._kernel}, called for {self._where(operands)},"
        check_unwritten(before, operands, self._call.names, who, self._copied)
        sizes = self._told_sizes(operands)
        known = Known(
            sizes,
            tuple(reach(operands[i]) for i in self._lent),
            tuple(
                0 if size is None else size.numel() * dtype.itemsize
                for size, (dtype, _, _) in zip(sizes, self._expected, strict=True)
            ),
        )
        made = self._fitted(result, known, operands)
        if form is not None:
            remember(self._known, form, known)
        return made

    def _fitted(self, result: Any, known: Known, operands: Sequence[Any]) -> Any:
        """The results of a call, made to fit where they do not."""
        tensors = self._tensors(result, known, operands)
        tensors += [operands[i] for i in self.returned]
        made = owned(tensors, [operands[i] for i in self._lent])
        return made[0] if self.count == 1 else tuple(made)

    def _copying(self, *operands: Any) -> Any:
        """The forward op of a kernel that writes into its operands: it gets copies."""
        copies = tuple(
            contiguous_copy(v) if i in self._copied else v for i, v in enumerate(operands)
        )
        with torch.no_grad():
            return self._checked(None, copies)

    def _tensors(self, result: Any, known: Known, operands: Sequence[Any]) -> list[Tensor]:
        """The tensors of what the kernel returned, if that is what the layer does."""
        try:
            tensors, output = flatten_tensors(result)
        except UnsupportedValue:
            found = f"a {type(result).__name__}"
            raise self._mismatch(found, self._output.describe(), operands) from None
        if output != self._output:
            raise self._mismatch(output.describe(), self._output.describe(), operands)
        for tensor, expected, size in zip(tensors, self._expected, known.sizes, strict=True):
            self._check(tensor, expected, size, operands)
        return tensors

    def _check(self, tensor: Tensor, expected: Any, size: Any, operands: Sequence[Any]) -> None:
        dtype, device, dims = expected
        if (
            tensor.dtype is not dtype
            or tensor.device.type != device
            or (tensor.dim() != dims if size is None else tensor.shape != size)
        ):
            raise self._mismatch(
                f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}",
                f"a {dtype} tensor of "
                + (f"{dims} dimensions" if size is None else f"shape {tuple(size)}")
                + f" on {device}",
                operands,
            )

    def _told_sizes(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """The sizes that the results must have; None where they cannot be told."""
        try:
            return tuple(torch.Size(r.shape) for r in self._shapes(operands))
        except Exception:
            return (None,) * len(self._expected)

    def fake(self, *operands: Any) -> Any:
        """What `forward` returns, with the shapes alone."""
        made = make_fakes(self._shapes(operands))
        _torch.bind_unbacked_symbols(made, operands)
        made += [like(operands[i]) for i in self.returned]
        return made[0] if len(made) == 1 else tuple(made)

    # --- what goes wrong ----------------------------------------------------------------

    def _where(self, operands: Sequence[Any]) -> str:
        return f"layer {self._layer.layer_name}{self.places.describe(operands)}"

    def _fail(self, error: Exception, operands: Sequence[Any]) -> NoReturn:
        if isinstance(error, torch.OutOfMemoryError):  # some catch it and try a smaller batch
            raise error
        raise RuntimeError(
            f"kernel {self._kernel}, called for {self._where(operands)}, raised "
            f"{type(error).__name__}: {error}"
        ) from error

    def _mismatch(self, found: str, expected: str, operands: Sequence[Any]) -> RuntimeError:
        return RuntimeError(
            f"kernel {self._kernel} returned {found} for {self._where(operands)}; expected is "
            f"{expected}"
        )


def like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the shape, dtype and device of ``tensor``."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class Places:
    """The paths of the layers that call one op. Layers that are alike share an op."""

    def __init__(self) -> None:
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def add(self, module: nn.Module, path: str) -> None:
        """Note that the op is called for ``module``, which the model has at ``path``."""
        self._paths[module] = path

    def describe(self, operands: Iterable[object]) -> str:
        """Words for the layer that is called with ``operands``: those of its places whose weights
        are among them, or if none can be told by its weights, all."""
        given = {v.data_ptr() for v in operands if isinstance(v, Tensor)} - {0}
        paths = [path for module, path in self._paths.items() if _holds_any(module, given)]
        paths = paths or list(self._paths.values())
        paths = [path or "(model)" for path in dict.fromkeys(paths)]
        if len(paths) < 2:
            return "".join(f" at {path}" for path in paths)
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f" at one of {', '.join(paths[:3])}{more}"


def _holds_any(module: nn.Module, addresses: set[int]) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(tensor.data_ptr() in addresses for tensor in tensors)
