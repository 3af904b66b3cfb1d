"""Rewritten graphs in another process, and ops made again."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import kernelgraph
from kernelgraph import Mode, Tracer, rewrite
from kernelgraph.graph.fx.pickling import SavedOp
from kernelgraph.selection import Selection
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale
from tests.support.toys import BrokenRepository, ToyRepository, only

X = torch.ones(2, 4)


class Model(nn.Module):
    """A `Chain` without annotations: torch cannot pickle graphs whose inputs have strings there."""

    def __init__(self):
        super().__init__()
        self.chain = Chain()

    def forward(self, x):
        return self.chain(x)


def rewritten(mode: Mode = Mode.INFERENCE) -> fx.GraphModule:
    model = Model()
    with only(Scale=OpaqueScale):
        graph_module = fx.GraphModule(model, Tracer().trace(model))
        return rewrite(graph_module, mode=mode, example_inputs=(X,), verify_gradients=False)


def saved(graph_module: fx.GraphModule) -> SavedOp:
    (op,) = graph_module.meta["kernelgraph_ops"].values()
    return op


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING])
def test_pickled_graph_runs_in_another_process(tmp_path: Path, mode: Mode):
    graph_module = rewritten(mode)
    graph_module(X).sum()
    (tmp_path / "graph").write_bytes(pickle.dumps((graph_module, graph_module(X).detach())))
    program = f"""
import pickle
graph_module, expected = pickle.load(open({str(tmp_path / "graph")!r}, "rb"))
import torch
made = graph_module(torch.ones(2, 4))
assert torch.equal(made, expected)
assert graph_module(torch.ones(5, 4)).shape == (5, 4)
if {mode is Mode.TRAINING}:
    made.sum().backward()
    assert graph_module.get_parameter("chain.layers.0.weight").grad.abs().sum() > 0
print("ran", *[n.target.name() for n in graph_module.graph.nodes if "hubkernels" in str(n.target)])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == f"ran hubkernels::{saved(graph_module).name} " + (
        f"hubkernels::{saved(graph_module).name}\n"
    ), run.stderr


def test_copies_carry_their_ops():
    graph_module = rewritten()
    assert saved(copy.deepcopy(graph_module)) is saved(graph_module)


def loading(op: SavedOp, **changes: Any) -> SavedOp:
    """Load a changed copy of ``op`` under a name that is not registered here."""
    changed = pickle.dumps(dataclasses.replace(op, name=f"{op.name}_of_old", **changes))
    return pickle.loads(changed)  # type: ignore[no-any-return]


def test_op_that_is_registered_is_not_made_again(monkeypatch):
    op = saved(rewritten())
    monkeypatch.setattr("kernelgraph.graph.fx.pickling._make", None)
    assert pickle.loads(pickle.dumps(op)) == op


def test_op_that_gets_another_name_is_an_error():
    op = saved(rewritten())
    message = (
        rf"^the graph calls op hubkernels::{op.name}_of_old of kernel tests@\w+: OpaqueScale, and "
        rf"here it would be {op.name}: the kernel or the layer is another one than it was\. "
    )
    with pytest.raises(RuntimeError, match=message):
        loading(op)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"selection": lambda s: Selection(BrokenRepository(), s.mode, s.device)},
            "OSError: toy repository out of reach",
        ),
        ({"cls": lambda _: nn.Linear}, "TypeError: class Linear is not extensible"),
        ({"mode": lambda _: Mode.TRAINING}, "ValueError: the kernel has no backward"),
    ],
    ids=["repository", "class", "kernel"],
)
def test_op_that_cannot_be_made_is_an_error(changes: Any, why: str):
    op = saved(rewritten())
    if "mode" in changes:
        from tests.support.toy_models import ForwardOnlyScale

        repository = ToyRepository(ForwardOnlyScale)
        op = dataclasses.replace(
            op, selection=Selection(repository, op.selection.mode, op.selection.device)
        )
    changed = {name: change(getattr(op, name)) for name, change in changes.items()}
    with pytest.raises(RuntimeError, match=rf"^the graph calls op .* cannot be made here: {why}"):
        loading(op, **changed)


def test_op_for_symbolic_sizes_is_saved_with_their_hints():
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(3, 4), symbolic_context=context, source=ConstantSource("x"))
    model = nn.Sequential(Scale())
    graph_module = fx.GraphModule(model, Tracer().trace(model))
    with only(Scale=TraceableScale):
        rewrite(graph_module, mode=Mode.INFERENCE, example_inputs=(x,))
    op = saved(graph_module)
    assert op.operands[0][:2] == ((3, 4), (4, 1))
    assert pickle.loads(pickle.dumps(op)) == op
    assert kernelgraph.last_report().kernels
