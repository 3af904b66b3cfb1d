"""The FX pass: extensible layers that are leaves of a graph become kernel ops.

Dynamo's graphs come with their kernels in them (`kernelgraph.graph.compile.capture`). In others, those
of ``torch.fx`` tracers with layers as leaves, an extensible layer is one ``call_module`` node, and
an extensible function one ``call_function`` node. The pass

1. walks the nodes once, and asks for each such node the same question as capture does;
2. writes the op's call in front of it, with ``get_attr`` nodes for the state that the op reads;
3. hands the node's uses to the op's results, and removes what is now unused.

It is legal because an op returns what the layer's reference does: tensors of the same ranks,
dtypes and devices, in the same structure; a layer for which that is not so keeps its node.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import Path, flatten, path_text, read
from kernelgraph.graph.fx.pickling import save_op
from kernelgraph.graph.fx.planner import Chosen, Plan, plan, plan_with
from kernelgraph.graph.gradients import handle
from kernelgraph.graph.infer import VALUES, TensorSpec, make_fakes, plain
from kernelgraph.graph.lowering import GraphDecisions, KeepReference, Options, Site, decision_of
from kernelgraph.graph.ops import Lowered, overload, pack
from kernelgraph.kernel import Gradients
from kernelgraph.report import Reason, Report, publish
from kernelgraph.selection import Mode, current_mapping, tried

logger = logging.getLogger("kernelgraph")


def rewrite(
    graph_module: fx.GraphModule,
    *,
    mode: Mode,
    example_inputs: Sequence[Any] | None = None,
    verify_gradients: bool = True,
    wrong_gradient: str = "recompute",
) -> fx.GraphModule:
    """Make each call of an extensible layer in a graph a call of a hub kernel, as a custom op.

    For the graphs of ``torch.fx`` tracers that have extensible layers as leaves, as
    `kernelgraph.Tracer` has; the graph modules that the graph calls are rewritten too. The graph
    is changed in place, or, where an error is raised, not at all. It runs eagerly and under any
    backend of torch.compile, and reads the parameters of the same modules as before, which stay
    where they are. A second run finds nothing to do. `kernelgraph.last_report` says what was
    decided for each call.

    An op needs to know the ranks, dtypes and devices of what a layer takes, from the fake values
    that the nodes carry (``meta["val"]``, or Dynamo's ``meta["example_value"]``) or from a run of
    the graph on fakes of ``example_inputs``, which leaves each node its ``val``. The nodes that
    are not replaced keep the rest of their metadata, and an op has its layer's. What a layer reads
    of itself other than tensors, and the autocast region around this call, are those of now.

    Args:
        graph_module: What to change.
        mode: ``Mode.INFERENCE`` or ``Mode.TRAINING``, with or without ``| Mode.TORCH_COMPILE``:
            what to choose kernels for. Only an op for training has a gradient: the kernel's own
            where that is verified to be the layer's, else the layer's. A layer that was kernelized
            for torch.compile keeps its kernel.
        example_inputs: The graph's positional arguments, real or fake. Other sizes will do at run
            time; other ranks, dtypes and devices, or a tensor for a None, will not.
        verify_gradients, wrong_gradient: As in `kernelgraph.kernelize`.

    Returns:
        ``graph_module`` itself.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` or ``wrong_gradient`` is not one that there is, the nodes carry no
            fake values and there are no ``example_inputs``, or these do not fit the graph.
        RuntimeError: If a node does not run on fakes.
        Exception: Whatever a repository raises where it cannot be loaded.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(f"rewrite changes a torch.fx.GraphModule, not {_kind(graph_module)}")
    mode = Mode.parse(mode)
    tried(mode)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            f"example_inputs is a tuple of the graph's arguments, not {_kind(example_inputs)}"
        )
    training = Mode.TRAINING in mode
    gradients = Gradients.parse(verify_gradients, wrong_gradient)
    options = Options(kernel_mode=mode, gradients=gradients)
    choices = GraphDecisions(options, current_mapping(), training=training)
    if example_inputs is None:
        plans = plan(graph_module, choices, need_values=True)
    else:
        plans = plan_with(graph_module, example_inputs, choices)
    for item, op in replace_layers(plans, choices):
        _complete(item, op)
        _save(item)
    publish(Report("rewrite", tuple(choices.decisions)))
    return graph_module


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


# --- the graph ----------------------------------------------------------------------------------


def replace_layers(plans: Sequence[Plan], choices: GraphDecisions) -> list[tuple[Plan, fx.Node]]:
    """Put ops into the places of the nodes that were planned so, and note each decision.

    Returns:
        The plans that were carried out, and their ops.
    """
    done = []
    for item in plans:
        try:
            done.append((item, _replace(item)))
        except KeepReference as kept:
            choices.decisions.append(kept.decision)
            continue
        assert isinstance(item.outcome, Chosen)
        kernel, _, _, lowered, gradient = item.outcome
        choices.decisions.append(decision_of(item.site, kernel, lowered, gradient))
    for graph_module in dict.fromkeys(item.graph_module for item, _ in done):
        graph_module.graph.lint()
        graph_module.recompile()
    if done:
        logger.debug("rewrite: %d calls of layers became kernel ops", len(done))
    return done


def _replace(item: Plan) -> fx.Node:
    if isinstance(item.outcome, KeepReference):
        raise item.outcome
    if item.outcome is None:
        raise KeepReference(item.site, Reason.NOT_AN_OP, "the graph module around it is not run")
    call, lowered = item.outcome.call, item.outcome.lowered
    node, graph = item.node, item.graph_module.graph
    _check_fits(node, lowered, item.site)

    origin = {key: node.meta[key] for key in _ORIGIN if key in node.meta}
    with graph.inserting_before(node):
        arguments = plain(node.args), plain(node.kwargs)
        given = [_pick(graph, arguments, path, origin) for path in call.argument_paths]
        for path in call.state.tensors:
            # Not by graph.get_attr, which warns of tensors that are neither parameter nor buffer.
            given.append(graph.create_node("get_attr", f"{node.target}.{path_text(path)}"))
            given[-1].meta = dict(origin)
        given += [number for _, number in call.state.numbers]
        op = graph.call_function(overload(lowered.name), tuple(pack(given, lowered.packed)))
        op.meta = dict(origin)
        results = [op]
        if lowered.returns > 1:
            count = len(lowered.results)
            results = [graph.call_function(operator.getitem, (op, i)) for i in range(count)]
    if lowered.returns > 1:
        for key in VALUES:
            if key in node.meta:
                leaves, _ = flatten(plain(node.meta[key]))
                op.meta[key] = tuple(leaves)
    _hand_over(graph, node, lowered.output.unflatten(results))
    for piece in results:
        if piece is not op and not piece.users:
            graph.erase_node(piece)
    return op


def _pick(graph: fx.Graph, value: Any, path: Path, origin: dict[str, Any]) -> Any:
    """What ``path`` leads to in arguments, some of it maybe inside what one node returns."""
    for step in path:
        if isinstance(value, fx.Node):
            whole = value
            by_name = isinstance(step, str)
            value = graph.call_function(
                getattr if by_name else operator.getitem, (whole, step if by_name else step[0])
            )
            inside = {k: read(whole.meta[k], (step,)) for k in VALUES if k in whole.meta}
            value.meta = {**origin, **inside}
        else:
            value = read(value, (step,))
    return value


def _check_fits(node: fx.Node, lowered: Lowered, site: Site) -> None:
    """Keep a node that the op's results would not fit in the place of."""

    def keep(detail: str) -> KeepReference:
        return KeepReference(site, Reason.NOT_AN_OP, detail)

    pieces = lowered.output.unflatten(lowered.results)
    if isinstance(pieces, TensorSpec):
        uses = [(node, pieces)]
    else:
        # Results that are not one tensor can only be handed over piece by piece.
        uses = []
        for user in node.users:
            try:
                piece = pieces[user.args[1]] if user.target is operator.getitem else None
            except (LookupError, TypeError):
                piece = None
            if not isinstance(piece, TensorSpec):
                raise keep("what it returns is used as a whole")
            uses.append((user, piece))
    for traced, result in uses:
        value = next((traced.meta[key] for key in VALUES if key in traced.meta), None)
        if isinstance(value, Tensor) and _form(value) != _form(result):
            raise keep(f"the kernel returns a {_form(result)}, and the layer a {_form(value)}")


def _form(value: Any) -> str:
    return f"{len(value.shape)}-d {value.dtype} tensor on {value.device.type}"


def _hand_over(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Put ``value``, a node or nodes in a container, in the place of ``node``."""
    if isinstance(value, fx.Node):
        value.meta |= {key: node.meta[key] for key in _VALUE_META if key in node.meta}
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            piece = value[user.args[1]]
            piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
    graph.erase_node(node)


_VALUE_META = (*VALUES, "tensor_meta")
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


def _complete(item: Plan, op: fx.Node) -> None:
    """Give an op, and the new nodes around it, the values that a run of it on fakes has.

    The layer's may have other strides. A backend traces the graph once more and needs none of it.
    """
    assert isinstance(item.outcome, Chosen)
    found = [(key, n) for n in (op, *op.all_input_nodes) for key in VALUES if key in n.meta]
    key, carrier = found[0] if found else ("val", op)
    mode = _torch.fake_mode_for([carrier.meta.get(key)])
    for node in op.all_input_nodes:
        if node.op == "get_attr" and key not in node.meta:
            state: Any = item.graph_module
            for name in str(node.target).split("."):
                state = getattr(state, name)
            node.meta[key] = _torch.to_fake(mode, state)
    results, returns = item.outcome.lowered.results, item.outcome.lowered.returns
    whole = op.meta.get(key)
    values: Sequence[Any] = [whole] if returns == 1 else list(whole or ())
    with _torch.running_on(mode):
        if not (len(values) == len(results) and all(map(_matches_spec, values, results))):
            values = make_fakes(results)
        values = [*values, *(handle() for _ in range(returns - len(values)))]
    made: list[tuple[fx.Node, Any]] = [(op, values[0])]
    if returns > 1:
        pieces: list[Any] = [(user, user.args[1]) for user in op.users]
        made = [(op, tuple(values)), *((user, values[i]) for user, i in pieces)]
    for node, value in made:
        node.meta[key] = value
        if getattr(node.meta.get("tensor_meta"), "stride", None) not in (None, _stride(value)):
            del node.meta["tensor_meta"]


def _matches_spec(value: Any, result: TensorSpec) -> bool:
    """Whether a value is what an op returns; never asked of symbols, which it would guard."""
    return (
        isinstance(value, Tensor)
        and all(type(n) is int for n in (*value.shape, *result.shape))
        and (tuple(value.shape), value.dtype, value.device) == tuple(result)
        and value.is_contiguous()
    )


def _save(item: Plan) -> None:
    site, chosen = item.site, item.outcome
    assert isinstance(chosen, Chosen)
    assert site.target is not None
    assert site.mode is not None
    save_op(
        item.graph_module,
        chosen.lowered.name,
        chosen.kernel,
        type(site.module),
        site.target,
        site.mode,
        chosen.call,
        chosen.operands,
        gradient=chosen.gradient,
    )


def _stride(value: Any) -> Any:
    return value.stride() if isinstance(value, Tensor) else None
