"""The programs that compete for a call: its neighbourhood, with each way to compute it in turn.

Each is compiled by the compiler that will compile the whole graph, and run on inputs made up after
the call that is traced: its sizes, dtypes and layout, and the layer's own weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune.benchmark import Sampler
from kernelgraph.graph.autotune.cuda_graphs import waits
from kernelgraph.graph.autotune.records import NATIVE, OP
from kernelgraph.graph.autotune.region import Neighbourhood
from kernelgraph.graph.calls import Call, Runner, State, constants_in, read
from kernelgraph.graph.gradients import Gradient
from kernelgraph.graph.infer import NoValue, Operands, indices, sample_inputs, value_of
from kernelgraph.graph.lowering import Options, Site, op_for
from kernelgraph.graph.ops import Lowered, results_of, unpack
from kernelgraph.kernel import Kernel
from kernelgraph.selection import device_name

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Unmeasurable(Exception):
    """There is no telling how long a call takes."""


@dataclass(frozen=True)
class Pending:
    """A call that became an op for now, of a kind for which nobody has measured what is best."""

    site: Site
    kernels: tuple[Kernel, ...]
    """Those that may be used; the op is of the first."""
    call: Call
    operands: Sequence[Any]
    """As they are in the trace."""
    lowered: Lowered
    gradient: Gradient | None
    options: Options

    @property
    def about(self) -> dict[str, str]:
        """What the call is, for people."""
        site = self.site
        tensors = [v for v in self.operands if isinstance(v, Tensor)]
        sizes = ["x".join(str(_torch.hint(n)) for n in v.shape) for v in tensors]
        dtypes = [str(v.dtype).removeprefix("torch.") for v in tensors]
        takes = [f"{d}[{s}]" for d, s in zip(dtypes, sizes, strict=True)]
        return {
            "layer": site.layer.layer_name,
            "device": ", ".join(sorted({device_name(v.device) for v in tensors})),
            "mode": str(site.mode),
            "takes": ", ".join([*takes, *(f"{n}={v!r}" for n, v in self._numbers.items())]),
            "kernels": ", ".join(map(str, self.kernels)),
        }

    @property
    def _numbers(self) -> dict[str, Any]:
        """The whole numbers and constants among the arguments, by name."""
        arguments = self.operands[: self.call.first_state]
        given = zip(self.call.names, arguments, strict=False)
        numbers = {n: _torch.hint(v) for n, v in given if not isinstance(v, (Tensor, float))}
        return {**numbers, **constants_in(self.call.arguments, self.site.layer)}

    def is_like(self, node: fx.Node) -> bool:
        """Whether an op's node calls it with such tensors and numbers as this call has."""
        given = unpack(list(node.args), self.lowered.packed)
        try:
            values = [value_of(v) if isinstance(v, fx.Node) else v for v in given]
        except NoValue:
            return False
        now = sample_inputs.measures_now
        return [*map(now, values)] == [*map(now, self.operands)]


class Stand(nn.Module):
    """Computes a call in the place of its op, in Python that a compiler traces."""

    def __init__(self, compute: Callable[..., Any], pending: Pending) -> None:
        super().__init__()
        self._run = Runner(compute, pending.call)
        self._packed = pending.lowered.packed
        self._written = pending.lowered.written
        self._alone = pending.lowered.returns == 1

    def forward(self, *arguments: Any) -> Any:
        results = self._run.results(unpack(arguments, self._packed), self._written)
        return results[0] if self._alone else tuple(results)


def program(around: Neighbourhood, pending: Pending, how: str, number: int) -> fx.GraphModule:
    """A neighbourhood with the call computed in one way.

    Args:
        around: The neighbourhood, with the op of the first kernel.
        pending: The call.
        how: `OP`, `NATIVE` or `REFERENCE`.
        number: Which of the kernels.
    """
    graph = copy.deepcopy(around.graph_module.graph)
    made = fx.GraphModule(around.graph_module, graph)
    if (how, number) == (OP, 0):
        return made
    kernel = pending.kernels[number]
    if how == OP:
        compute = _other_op(pending, kernel)
    else:
        compute = kernel.forward if how == NATIVE else pending.site.layer.reference
    node = next(n for n in graph.nodes if n.name == around.node.name)
    made.add_submodule("kernelgraph_stand", Stand(compute, pending))
    with graph.inserting_before(node):
        stand = graph.call_module("kernelgraph_stand", node.args, node.kwargs)
    stand.meta = dict(node.meta)
    node.replace_all_uses_with(stand)
    graph.erase_node(node)
    made.recompile()
    return made


def _other_op(pending: Pending, kernel: Kernel) -> Callable[..., Any]:
    """The op of another kernel than the first, in the form of a forward.

    It may read other state, which is taken from the layer.
    """
    site, layer = pending.site, pending.site.layer
    state = State.of(site.module, [layer.reference, kernel.forward])
    held = [read(site.module, path).detach() for path in state.tensors]
    for path, tensor in zip(state.tensors, held, strict=True):
        tensor.requires_grad_(site.grad and read(site.module, path).requires_grad)
    given = pending.call.arguments.unflatten(pending.operands)
    call, operands = Call.of(state, held, layer, *given)
    call = replace(call, autocast=pending.call.autocast)
    lowered, _ = op_for(site, kernel, call, operands, pending.options)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _, operands = Call.of(state, held, layer, args, kwargs)
        return lowered.output.unflatten(results_of(lowered.name, lowered.packed, operands))

    return forward


# --- inputs -------------------------------------------------------------------------------------


def inputs_for(around: Neighbourhood, pending: Pending) -> list[Any]:
    """Values for the placeholders of a neighbourhood.

    Raises:
        Unmeasurable: Some depend on values in a way that nothing tells.
    """
    if None in _torch.hints(n for v in around.inputs for n in sample_inputs.measures(v)).values():
        raise Unmeasurable("its sizes depend on values")
    known = sample_inputs.sizes_now(around.inputs)
    placeholders = [n for n in around.graph_module.graph.nodes if n.op == "placeholder"]
    given = unpack(list(around.node.args), pending.lowered.packed)
    bounds = _index_bounds(pending, given)
    try:
        forms = sample_inputs.forms(around.inputs, lambda size: _torch.evaluate(size, known))
        for i, node in enumerate(given):
            if isinstance(node, fx.Node) and node in placeholders:
                at = placeholders.index(node)
                if (weight := _weight(pending, i)) is not None:
                    forms[at] = weight
                elif i in bounds:
                    forms[at] = indices(forms[at], bounds[i], 0)
        made = sample_inputs.make(forms, 0)
    except TypeError as error:
        raise Unmeasurable(str(error)) from error
    if pending.site.grad:
        for value, like in zip(made, around.inputs, strict=True):
            if isinstance(like, Tensor) and like.requires_grad:
                value.requires_grad_()
    return made


def _weight(pending: Pending, operand: int) -> Tensor | None:
    """The layer's own tensor for an operand, if it is one; not a copy.

    Raises:
        Unmeasurable: It has no memory, and so there is no knowing whether there is enough.
    """
    state = operand - pending.call.first_state
    if not 0 <= state < len(pending.call.state.tensors):
        return None
    weight: Tensor = read(pending.site.module, pending.call.state.tensors[state])
    if _torch.is_fake(weight) or weight.is_meta:
        raise Unmeasurable("the layer's weights are not at hand")
    return weight.detach()


def _index_bounds(pending: Pending, given: Sequence[Any]) -> dict[int, int]:
    """Of the operands that are indices from outside, the numbers that they are below.

    Raises:
        Unmeasurable: Nothing tells them: what takes zeros for indices says nothing.
    """
    count = pending.call.first_state
    there = [
        i
        for i, v in enumerate(pending.operands[:count])
        if isinstance(v, Tensor)
        and v.dtype in (torch.int32, torch.int64)
        and isinstance(given[i], fx.Node)
        and given[i].op == "placeholder"
    ]
    if not there:
        return {}
    maker = Operands(pending.call, pending.operands, pending.site.module, trial=True)
    bounds = maker.index_bounds(Runner(pending.site.layer.reference, pending.call))
    if missing := [pending.call.names[i] for i in there if i not in bounds]:
        raise Unmeasurable(f"nothing tells what indices {missing[0]} may hold")
    return bounds


# --- running ------------------------------------------------------------------------------------


def prepared(
    run: Callable[..., Any], inputs: Sequence[Any], grad: bool, pool: Any = None
) -> Sampler:
    """Times a program that was compiled, forward and, with ``grad``, backward; it is run once.

    Args:
        run: The program.
        inputs: What it is run on.
        grad: Whether a gradient can flow through it.
        pool: Where it will be in a CUDA graph, and so is to be timed in one if it can be, the
            pool for the graph's memory.

    Raises:
        Exception: What it raises.
    """
    call = _with_backward(run, inputs) if grad else lambda: run(*inputs)
    with _torch.compiling_apart():
        for _ in range(2):  # what tunes itself, or compiles its backward, does so now
            call()
    device = next((v.device for v in inputs if isinstance(v, Tensor) and v.is_cuda), None)
    if device is None:
        return _on_host(call)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        if pool is not None and not waits(call):
            call = _captured(call, pool)
    return _on_cuda(call, device)


def _with_backward(run: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    leaves = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    grads: list[Tensor] = []

    def step() -> Any:
        with torch.enable_grad():
            results = [r for r in run(*inputs) if isinstance(r, Tensor) and r.requires_grad]
            if not grads:
                grads.extend(map(torch.ones_like, results))
            return torch.autograd.grad(results, leaves, grads, allow_unused=True)

    return step


def _captured(call: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """A replay of a CUDA graph of ``call``. Nobody looks at its results, whose memory the next
    graph of the pool has too."""
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile, that of a loader of data, say, is their own matter.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _on_cuda(call: Callable[[], Any], device: torch.device) -> Sampler:
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def sample(calls: int) -> float:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return sample


clock = time.perf_counter


def _on_host(call: Callable[[], Any]) -> Sampler:
    def sample(calls: int) -> float:
        started = clock()
        for _ in range(calls):
            call()
        return clock() - started

    return sample
