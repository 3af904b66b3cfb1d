"""The FX pass: calls of extensible layers in a graph become calls of kernel ops.

It is for graphs in which a layer is a leaf: an extensible layer is one ``call_module`` node there,
and an extensible function one ``call_function`` node. torch.fx tracers make such graphs. In those
of Dynamo the ops are there already (`kernelgraph.graph.compile.capture`). The pass

1. plans: it visits the nodes once, chooses a kernel for each such call, and lowers it to an op;
2. replaces: it writes each op in front of its layer's node, with ``get_attr`` nodes for the state
   that the op reads, gives the node's uses to the op's results, and erases the node;
3. completes the metadata of the new nodes;
4. stores in the graph module how to make the ops again, for pickles;
5. copies what an op saves for its backward and a later node writes into;
6. reports each decision.

This keeps the graph's meaning because an op returns what the layer's reference returns: tensors of
the same ranks, dtypes and devices, in the same structure. A layer whose op does not keeps its node.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from kernelgraph.graph.calls import Call, Path, flatten, path_text, read
from kernelgraph.graph.fx.node_metadata import copy_value, place_in_model, set_values
from kernelgraph.graph.fx.pickling import save_op
from kernelgraph.graph.fx.planner import PlannedCall, Replacement, plan, plan_from_inputs
from kernelgraph.graph.fx.saved_operands import copy_saved_operands
from kernelgraph.graph.infer import VALUES, TensorSpec, plain
from kernelgraph.graph.lowering import GraphDecisions, KeepReference, Options, Site, decision_of
from kernelgraph.graph.ops import Lowered, overload, pack
from kernelgraph.kernel import Gradients
from kernelgraph.report import Reason, Report, publish
from kernelgraph.selection import Mode, current_mapping, serving_modes

logger = logging.getLogger("kernelgraph")


def rewrite(
    graph_module: fx.GraphModule,
    *,
    mode: Mode,
    example_inputs: Sequence[object] | None = None,
    verify_gradients: bool = True,
    wrong_gradient: str = "recompute",
) -> fx.GraphModule:
    """Replace each call of an extensible layer in a graph by a hub kernel, as a custom op.

    The layers have to be leaves of the graph, as `kernelgraph.Tracer` makes them. The graph modules
    that the graph calls are rewritten too. The graph is changed in place, or, if an error is
    raised, not at all. It runs eagerly and under any backend of torch.compile, and reads the
    parameters of the same modules as before, which stay where they are. A second run finds nothing
    to do. `kernelgraph.last_report` has the decision for each call.

    An op is made for the ranks, dtypes and devices of what a layer takes. They come from the fake
    values in the nodes' metadata (``meta["val"]``, or Dynamo's ``meta["example_value"]``), or from
    a run of the graph on fakes of ``example_inputs``, which stores each node's ``val``. Nodes that
    are not replaced keep the rest of their metadata, and an op gets its layer's. The attributes
    that a layer reads, other than tensors, and the autocast region are those at the time of this
    call.

    Args:
        graph_module: The graph to change.
        mode: The mode to choose kernels for: ``Mode.INFERENCE`` or ``Mode.TRAINING``, with or
            without ``| Mode.TORCH_COMPILE``. Only an op for training has a gradient: the kernel's
            own if that is verified to be the layer's, else the layer's. A layer that was kernelized
            for torch.compile keeps its kernel.
        example_inputs: The graph's positional arguments, real or fake. At run time sizes may
            differ; ranks, dtypes and devices may not, nor may a tensor take the place of a None.
        verify_gradients: As for `kernelgraph.kernelize`.
        wrong_gradient: As for `kernelgraph.kernelize`.

    Returns:
        ``graph_module`` itself.

    Raises:
        TypeError: If an argument is of the wrong type, or a hub layer is impure or does not fit.
        ValueError: If ``mode`` or ``wrong_gradient`` has no such value, the nodes carry no fake
            values and there are no ``example_inputs``, or these do not fit the graph.
        RuntimeError: If a node does not run on fakes.
        Exception: What a repository raises if it cannot be loaded.

    Example:
        >>> @kg.use_kernel_forward_from_hub("SiluAndMul")
        ... class SiluAndMul(torch.nn.Module):
        ...     def forward(self, x):
        ...         gate, up = x.chunk(2, dim=-1)
        ...         return torch.nn.functional.silu(gate) * up
        >>> kernel = kg.LocalLayerRepository("examples/kernels", layer_name="SiluAndMul")
        >>> model, x = torch.nn.Sequential(SiluAndMul()), torch.randn(2, 16)
        >>> graph_module = torch.fx.GraphModule(model, kg.Tracer().trace(model))
        >>> with kg.use_kernel_mapping({"SiluAndMul": {"cpu": kernel}}):
        ...     graph_module = kg.rewrite(
        ...         graph_module, mode=kg.Mode.INFERENCE, example_inputs=(x,)
        ...     )
        >>> [node.op for node in graph_module.graph.nodes]
        ['placeholder', 'call_function', 'output']
        >>> torch.testing.assert_close(graph_module(x), model(x))
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(f"rewrite changes a torch.fx.GraphModule, not {_type_name(graph_module)}")
    mode = Mode.parse(mode)
    serving_modes(mode)
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            f"example_inputs is a tuple of the graph's arguments, not {_type_name(example_inputs)}"
        )
    gradients = Gradients.parse(verify_gradients, wrong_gradient)
    options = Options(kernel_mode=mode, gradients=gradients)
    choices = GraphDecisions(options, current_mapping(), training=Mode.TRAINING in mode)
    # 1. Plan. Nothing in the graph has changed if this raises an error.
    if example_inputs is None:
        calls = plan(graph_module, choices, need_values=True)
    else:
        calls = plan_from_inputs(graph_module, example_inputs, choices)
    # 2. Replace the layers' nodes by ops.
    for planned, replacement, op in replace_layers(calls, choices):
        # 3. Complete the metadata of the new nodes.
        set_values(planned.graph_module, op, replacement.lowered)
        # 4. Store how to make the op again.
        _save(planned, replacement)
    # 5. Copy what ops save and later nodes write into.
    copy_saved_operands(graph_module)
    # 6. Report.
    publish(Report("rewrite", tuple(choices.decisions)))
    return graph_module


def _type_name(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


# --- replacing ----------------------------------------------------------------------------------


class Replaced(NamedTuple):
    """A call whose node was replaced."""

    planned: PlannedCall
    replacement: Replacement
    op: fx.Node
    """The node of the op."""


def replace_layers(calls: Sequence[PlannedCall], choices: GraphDecisions) -> list[Replaced]:
    """Replace the nodes that are planned so by ops, and note the decision for each call.

    Args:
        calls: The plan.
        choices: The decisions, to which those for these calls are added.

    Returns:
        The calls that were replaced.
    """
    done: list[Replaced] = []
    for planned in calls:
        try:
            replacement = _check(planned)
        except KeepReference as kept:
            choices.decisions.append(kept.decision)
            continue
        kernel, _, _, lowered, gradient = replacement
        done.append(Replaced(planned, replacement, _replace(planned, replacement)))
        choices.decisions.append(decision_of(planned.site, kernel, lowered, gradient))
    for graph_module in dict.fromkeys(planned.graph_module for planned, _, _ in done):
        graph_module.graph.lint()
        graph_module.recompile()
    if done:
        logger.debug("rewrite: %d calls of layers became kernel ops", len(done))
    return done


def _check(planned: PlannedCall) -> Replacement:
    """Return the replacement for a call if it fits the graph.

    Raises:
        KeepReference: If it does not, or none is planned.
    """
    if isinstance(planned.outcome, KeepReference):
        raise planned.outcome
    if planned.outcome is None:
        raise KeepReference(planned.site, Reason.NOT_AN_OP, "the graph module around it is not run")
    _check_fits(planned.node, planned.outcome.lowered, planned.site)
    return planned.outcome


def _check_fits(node: fx.Node, lowered: Lowered, site: Site) -> None:
    """Raise `KeepReference` for a node whose place the op's results do not fit."""

    def keep(detail: str) -> KeepReference:
        return KeepReference(site, Reason.NOT_AN_OP, detail)

    results = lowered.output.unflatten(lowered.results)
    if isinstance(results, TensorSpec):
        uses = [(node, results)]
    else:
        # Results that are not one tensor can only be handed over piece by piece.
        uses = []
        for user in node.users:
            try:
                result = results[user.args[1]] if user.target is operator.getitem else None
            except (LookupError, TypeError):
                result = None
            if not isinstance(result, TensorSpec):
                raise keep("what it returns is used as a whole")
            uses.append((user, result))
    for used, result in uses:
        value = next((used.meta[key] for key in VALUES if key in used.meta), None)
        if isinstance(value, Tensor) and _type_of(value) != _type_of(result):
            raise keep(
                f"the kernel returns a {_type_of(result)}, and the layer a {_type_of(value)}"
            )


def _type_of(tensor: Tensor | TensorSpec) -> str:
    return f"{len(tensor.shape)}-d {tensor.dtype} tensor on {tensor.device.type}"


def _replace(planned: PlannedCall, replacement: Replacement) -> fx.Node:
    """Write an op in the place of a layer's node, and return the op's node."""
    node, graph, lowered = planned.node, planned.graph_module.graph, replacement.lowered
    origin = place_in_model(node)
    # The op, in front of the node, and a node for each of its results if it returns several.
    with graph.inserting_before(node):
        arguments = pack(_arguments(graph, node, replacement.call, origin), lowered.packed)
        op = graph.call_function(overload(lowered.name), tuple(arguments))
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
    # The node's uses go to the results. Those that nothing uses leave no node.
    _hand_over(graph, node, lowered.output.unflatten(results))
    for result in results:
        if result is not op and not result.users:
            graph.erase_node(result)
    return op


def _arguments(
    graph: fx.Graph, node: fx.Node, call: Call, origin: dict[str, object]
) -> list[object]:
    """Return the op's operands: the layer's arguments, tensors of its state, and its numbers."""
    given = plain(node.args), plain(node.kwargs)
    operands = [_pick(graph, given, path, origin) for path in call.argument_paths]
    for path in call.state.tensors:
        # Not by graph.get_attr, which warns of tensors that are neither parameter nor buffer.
        state = graph.create_node("get_attr", f"{node.target}.{path_text(path)}")
        state.meta = dict(origin)
        operands.append(state)
    return [*operands, *(number for _, number in call.state.numbers)]


def _pick(graph: fx.Graph, value: object, path: Path, origin: dict[str, object]) -> object:
    """Return the part of arguments at ``path``; new nodes take it out of what a node returns."""
    for step in path:
        if isinstance(value, fx.Node):
            whole = value
            if isinstance(step, str):
                value = graph.call_function(getattr, (whole, step))
            else:
                value = graph.call_function(operator.getitem, (whole, step[0]))
            inside = {k: read(whole.meta[k], (step,)) for k in VALUES if k in whole.meta}
            value.meta = {**origin, **inside}
        else:
            value = read(value, (step,))
    return value


def _hand_over(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    """Give the uses of a layer's node to ``results``, one node or nodes in a container."""
    if isinstance(results, fx.Node):
        copy_value(node, results)
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # each is an operator.getitem
            result = results[user.args[1]]
            result.meta = dict(user.meta)
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    graph.erase_node(node)


def _save(planned: PlannedCall, replacement: Replacement) -> None:
    site = planned.site
    assert site.target is not None
    assert site.mode is not None
    save_op(
        planned.graph_module,
        replacement.lowered.name,
        replacement.kernel,
        type(site.module),
        site.target,
        site.mode,
        replacement.call,
        replacement.operands,
        gradient=replacement.gradient,
    )
