"""The body of an op: it runs the kernel, and checks and returns the results as a graph needs them.

A kernel may return views, memory that it shares with an operand, or the wrong shape, and may write
into its arguments; an op may not. `Body` stands between the two. The first call with operands of
some sizes goes through `Body._check_call`; the later ones take the fast path
(`kernelgraph.graph.ops.fast_path`), and come back to `Body._conform` only where a result does not
conform. An operand that the kernel writes into and the layer does not is restored, and the kernel
receives a copy of it from then on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from kernelgraph.cache import remember
from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Call, Runner, UnsupportedValue, flatten_tensors
from kernelgraph.graph.infer import (
    Effects,
    InferOutput,
    OutputSpec,
    ShapeFunction,
    Snapshot,
    copies_of,
    dense_strides,
    explain_attribute,
    make_fakes,
    owned,
    reach,
)
from kernelgraph.graph.ops.fast_path import (
    CheckedCall,
    Operand,
    OpFunction,
    OpResult,
    write_fast_path,
)
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.report import warn_once

WATCHED_CALLS = 4
"""The number of calls of an op, with operands of other sizes each, in which it is compared what
the kernel has written and drawn. Those with sizes that are new in each call would take too long."""


class TensorType(NamedTuple):
    """The dtype, type of device and rank of a tensor, the same in all calls of one signature."""

    dtype: torch.dtype
    device: str
    dims: int


class Body:
    """The functions behind the op of one call signature.

    Args:
        kernel: The kernel that `forward` runs.
        layer: The layer that is called.
        call: The signature of the call.
        shapes: Infers the results of a call from its operands.
        spec: The results of one such call; all calls have results of these dtypes, devices and
            ranks.
        effects: The operands that kernel and layer write into.
    """

    differentiable = False
    """Whether the results go through autograd, which forbids views."""

    forward: OpFunction
    """The op: the kernel, below autograd. Its results own their memory, and have the shapes and
    strides that `fake` gives."""

    def __init__(
        self,
        kernel: Kernel,
        layer: Extensible,
        call: Call,
        shapes: InferOutput,
        spec: OutputSpec,
        effects: Effects,
    ) -> None:
        self.places = Places()
        self.returned = effects.layer
        """The operands whose contents after the call are results too, behind the others."""
        self.count = len(spec.results) + len(self.returned)
        """The number of results that a gradient may come for."""
        self._kernel = kernel
        self._layer = layer
        self.call = call
        self._shapes = ShapeFunction(shapes)
        self._run_kernel = Runner(kernel.forward, call)
        self._output = spec.output
        self._expected = [TensorType(r.dtype, r.device.type, len(r.shape)) for r in spec.results]
        self._orders = [r.order for r in spec.results]
        self._copied = {*effects.kernel, *effects.layer}
        """The operands of which the kernel receives copies, since it writes into them."""
        self._checked_calls: dict[object, CheckedCall] = {}
        self._watched = 0
        """The number of calls that were watched."""
        self._records = False
        """Whether autograd records what the kernel does inside of it."""
        self.gave_way = ""
        """Why the reference runs in the kernel's place; empty where the kernel runs."""
        self.forward = self._write_fast_path()

    @property
    def returns(self) -> int:
        """The number of all results of the op."""
        return self.count

    # --- the forward op -----------------------------------------------------------------

    def _write_fast_path(self) -> OpFunction:
        return write_fast_path(
            self._run_kernel,
            self._output,
            [expected.dtype for expected in self._expected],
            self.call.tensors,
            differentiable=self.differentiable,
            table=self._checked_calls,
            check=self._check_call,
            conform=self._conform,
            fail=self._fail,
        )

    def _check_call(self, key: object, operands: tuple[Operand, ...]) -> OpResult:
        """Call the kernel and check all that it can do wrong.

        The call is recorded under ``key``, unless that is None or the kernel receives copies.
        """
        with torch.no_grad():
            made = self._try_call(key, operands)
            while made is None:
                made = self._try_call(key, operands)
            return made

    def _try_call(self, key: object, operands: tuple[Operand, ...]) -> OpResult | None:
        """Make a call as `_check_call` does; return None if it is to be made again."""
        given = copies_of(operands, self._copied) if self._copied else operands
        snapshot = self._snapshot(given)
        try:
            if snapshot is None:
                result = self._run_kernel(given)
            else:  # other callers of the op may be below autograd, where a kernel may fail
                with _torch.recording_gradients(enabled=False, below=True):
                    result = self._run_kernel.observe(given)
        except Exception as error:
            if snapshot is not None and isinstance(error, UnsupportedValue):
                snapshot.restore(snapshot.written())
                self._use_reference(str(error), operands)
                return None
            if snapshot is not None and self._records_from_now_on(error):
                snapshot.restore(snapshot.written())
                snapshot.generators.restore()
                return None
            self._fail(error, operands)
        checked = self._checked(given)
        made = self._conform(result, checked, given)
        if snapshot is not None and not self._leaves_no_trace(snapshot, operands):
            return None
        if key is not None and not self._copied:
            remember(self._checked_calls, key, checked)
        return made

    def _records_from_now_on(self, error: Exception) -> bool:
        """Let a kernel that has failed below autograd, which it may use itself, record from now on.

        Returns:
            Whether it is to be called once more.
        """
        if self._records or isinstance(error, torch.OutOfMemoryError):
            return False
        self._records = True
        self._run_kernel.replace_forward(_torch.recording(self._kernel.forward))
        return True

    def _snapshot(self, operands: Sequence[Operand]) -> Snapshot | None:
        """Return what the first calls of an op are compared with; None for the later ones."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._watched >= WATCHED_CALLS or capturing:
            return None
        self._watched += 1
        try:
            return Snapshot(operands)
        except torch.OutOfMemoryError:
            return None

    def _leaves_no_trace(self, snapshot: Snapshot, operands: Sequence[Operand]) -> bool:
        """Undo what a call has done besides returning results, and see to it that it does so no
        more.

        Returns:
            Whether the results may be used. They may not if the kernel drew random numbers.
        """
        snapshot.restore(written := snapshot.written() - self._copied)
        self._copied |= written
        if not snapshot.generators.changed():
            return True
        snapshot.generators.restore()
        self._use_reference("it draws random numbers, and the layer does not", operands)
        return False

    def _use_reference(self, why: str, operands: Sequence[Operand]) -> None:
        """Run the reference from now on, and warn of the kernel."""
        self.gave_way = why
        name, path = self._layer.layer_name, self.places.describe(operands).removeprefix(" at ")
        warn_once(str(self._kernel), name, path, why, "the layer runs on its own forward")
        self._run_kernel.replace_forward(self._layer.reference)

    def _checked(self, operands: Sequence[Operand]) -> CheckedCall:
        sizes = self._result_sizes(operands)
        strides, lengths = [], []
        for size, order, expected in zip(sizes, self._orders, self._expected, strict=True):
            strides.append(() if size is None else dense_strides(size, order))
            lengths.append(0 if size is None else size.numel() * expected.dtype.itemsize)
        spans = [reach(operands[i]) for i in self.call.tensors]
        return CheckedCall(sizes, tuple(strides), tuple(spans), tuple(lengths))

    def _conform(
        self, result: object, checked: CheckedCall, operands: Sequence[Operand]
    ) -> OpResult:
        """Return the results of a call; copy those that are not as `fake` says, or not in memory
        of their own."""
        tensors = self._tensors(result, checked, operands)
        tensors += [operands[i] for i in self.returned]
        # The kernel may return the copies that it received.
        shared = [operands[i] for i in self.call.tensors if i not in self._copied]
        made = owned(tensors, shared, [*self._orders, *[()] * len(self.returned)])
        return made[0] if self.count == 1 else tuple(made)

    def _tensors(
        self, result: object, checked: CheckedCall, operands: Sequence[Operand]
    ) -> list[Tensor]:
        """Return the tensors in what the kernel returned, if that is what the layer returns."""
        try:
            tensors, output = flatten_tensors(result)
        except UnsupportedValue:
            found = f"a {type(result).__name__}"
            raise self._mismatch(found, self._output.describe(), operands) from None
        if output != self._output:
            raise self._mismatch(output.describe(), self._output.describe(), operands)
        for tensor, expected, size in zip(tensors, self._expected, checked.sizes, strict=True):
            self._check_tensor(tensor, expected, size, operands)
        return tensors

    def _check_tensor(
        self,
        tensor: Tensor,
        expected: TensorType,
        size: torch.Size | None,
        operands: Sequence[Operand],
    ) -> None:
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

    def _result_sizes(self, operands: Sequence[Operand]) -> tuple[torch.Size | None, ...]:
        """The sizes that the results must have; None where they cannot be inferred."""
        try:
            shapes = [result.shape for result in self._shapes(operands)]
        except Exception:
            return (None,) * len(self._expected)
        return tuple(
            torch.Size(shape) if all(type(n) is int for n in shape) else None for shape in shapes
        )

    # --- its fake -----------------------------------------------------------------------

    def fake(self, *operands: Operand) -> OpResult:
        """Return fakes of the results of `forward`."""
        results = zip(self._shapes(operands), self._orders, strict=True)
        made = make_fakes([result._replace(order=order) for result, order in results])
        _torch.bind_unbacked_symbols(made, operands)
        made += [like(operands[i]) for i in self.returned]
        return made[0] if len(made) == 1 else tuple(made)

    # --- under transforms ---------------------------------------------------------------

    def transformed(self, *operands: Operand) -> OpResult:
        """Return the results by the layer's reference, whose ops torch can transform."""
        given = [v.clone() if i in self.returned else v for i, v in enumerate(operands)]
        results, _ = flatten_tensors(Runner(self._layer.reference, self.call)(given))
        results += [given[i] for i in self.returned]
        return results[0] if len(results) == 1 else tuple(results)

    # --- errors -------------------------------------------------------------------------

    def _where(self, operands: Sequence[Operand]) -> str:
        return f"layer {self._layer.layer_name}{self.places.describe(operands)}"

    def _fail(self, error: Exception, operands: Sequence[Operand]) -> NoReturn:
        """Raise the error of a kernel again, with the names of kernel, layer and place."""
        if isinstance(error, torch.OutOfMemoryError):  # some catch it and try a smaller batch
            raise error
        if isinstance(error, AttributeError):
            explain_attribute(error, "the kernel", self._kernel, self._layer, self.call)
        raise RuntimeError(
            f"kernel {self._kernel}, called for {self._where(operands)}, raised "
            f"{type(error).__name__}: {error}"
        ) from error

    def _mismatch(self, found: str, expected: str, operands: Sequence[Operand]) -> RuntimeError:
        return RuntimeError(
            f"kernel {self._kernel} returned {found} for {self._where(operands)}; expected is "
            f"{expected}"
        )


def like(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor of the shape, dtype and device of ``tensor``."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


class Places:
    """The call sites of an op: the layers that call it, and their paths. Layers with equal calls
    share an op."""

    def __init__(self) -> None:
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

    def add(self, module: nn.Module, path: str) -> None:
        """Note that the op is called for ``module``, which the model has at ``path``."""
        self._paths[module] = path

    def describe(self, operands: Iterable[object]) -> str:
        """Name the layer that is called with ``operands``, for an error.

        It is the one that has a weight among them. Where no layer has, all are named.
        """
        addresses = {v.data_ptr() for v in operands if isinstance(v, Tensor)} - {0}
        paths = [path for module, path in self._paths.items() if _holds_any(module, addresses)]
        paths = paths or list(self._paths.values())
        paths = [path or "(model)" for path in dict.fromkeys(paths)]
        if len(paths) < 2:
            return "".join(f" at {path}" for path in paths)
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f" at one of {', '.join(paths[:3])}{more}"


def _holds_any(module: nn.Module, addresses: set[int]) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(tensor.data_ptr() in addresses for tensor in tensors)
