"""The metadata of the nodes that the pass writes: where they come from, and their fake values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from kernelgraph.graph import _torch
from kernelgraph.graph.calls import read
from kernelgraph.graph.gradients import handle
from kernelgraph.graph.infer import VALUES, TensorSpec, make_fakes
from kernelgraph.graph.ops import Lowered

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")
_DESCRIPTIONS = (*VALUES, "tensor_meta")


def place_in_model(node: fx.Node) -> dict[str, object]:
    """Return the metadata that tells where in the model a node comes from."""
    return {key: node.meta[key] for key in _ORIGIN if key in node.meta}


def copy_value(node: fx.Node, result: fx.Node) -> None:
    """Give ``result`` the metadata that describes the value of ``node``."""
    result.meta |= {key: node.meta[key] for key in _DESCRIPTIONS if key in node.meta}


def set_values(graph_module: fx.GraphModule, op: fx.Node, lowered: Lowered) -> None:
    """Give an op, its state and its results the values that a run of them on fakes has.

    The layer's value, which the op has at first, may have other strides. A backend does without
    this, because it traces the graph once more.
    """
    found = [(key, n) for n in (op, *op.all_input_nodes) for key in VALUES if key in n.meta]
    key, carrier = found[0] if found else ("val", op)
    mode = _torch.fake_mode_for([carrier.meta.get(key)])
    for node in op.all_input_nodes:
        if node.op == "get_attr" and key not in node.meta:
            state = read(graph_module, tuple(str(node.target).split(".")))
            node.meta[key] = _torch.to_fake(mode, state)
    whole = op.meta.get(key)
    with _torch.running_on(mode):
        values = _values(lowered, [whole] if lowered.returns == 1 else list(whole or ()))
    if lowered.returns == 1:
        _set_value(op, key, values[0])
        return
    _set_value(op, key, tuple(values))
    for user in op.users:  # each is an operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        _set_value(user, key, values[index])


def _values(lowered: Lowered, layer_values: Sequence[object]) -> list[object]:
    """Return a value for each tensor that an op returns: the layer's where they all fit."""
    specs = lowered.results
    values: list[object] = list(layer_values)
    if not (len(values) == len(specs) and all(map(_matches_spec, values, specs))):
        values = [*make_fakes(specs)]
    return [*values, *(handle() for _ in range(lowered.returns - len(values)))]


def _matches_spec(value: object, spec: TensorSpec) -> bool:
    """Return whether an op may return ``value``; False for symbolic sizes, since a comparison would
    guard them."""
    return (
        isinstance(value, Tensor)
        and all(type(n) is int for n in (*value.shape, *spec.shape))
        and (tuple(value.shape), value.dtype, value.device) == tuple(spec)
        and value.is_contiguous()
    )


def _set_value(node: fx.Node, key: str, value: object) -> None:
    """Set the value of a node, and drop a ``tensor_meta`` with other strides."""
    node.meta[key] = value
    stride = value.stride() if isinstance(value, Tensor) else None
    if getattr(node.meta.get("tensor_meta"), "stride", None) not in (None, stride):
        del node.meta["tensor_meta"]
