"""The ops of exported programs: under transformations of graphs, and as data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.export import Dim

import kernelgraph
from kernelgraph import Mode, export, kernelize
from kernelgraph.programs.program_ops import ProgramOpSpec, installed_ops
from tests.support.exporting import INFERENCE, TRAINING, kernelized, ops
from tests.support.toy_models import Chain, OpaqueScale
from tests.support.toys import only


def test_ops_survive_export_decomposition_unflattening_and_compilation():
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(model, (x,), mode=INFERENCE, dynamic_shapes=({0: Dim.DYNAMIC},))
        want = kernelized(model, (x,))
    names = ops(program)
    again = torch.export.export(program.module(), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    decomposed = program.run_decompositions()
    assert ops(again) == ops(decomposed) == names
    for made in (program, again, decomposed):
        torch.testing.assert_close(made.module()(x), want)
    torch.testing.assert_close(torch.export.unflatten(program)(x), want)
    for inner in ("aot_eager", "inductor"):
        compiled = torch.compile(program.module(), backend=inner, dynamic=True)
        for y in (x, torch.randn(7, 4)):
            with torch.no_grad(), only(Scale=OpaqueScale):
                torch.testing.assert_close(compiled(y), kernelized(model, (y,)))


class InNumpy(OpaqueScale):
    """A kernel of this test alone, so that its op is new to Inductor."""


def test_inductor_compiles_a_program_in_ci(monkeypatch):
    """With CI set, Inductor stops at an op that has a decomposition, which ONNX export needs."""
    monkeypatch.setenv("CI", "true")
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=InNumpy), torch.no_grad():
        compiled = torch.compile(export(model, (x,), mode=INFERENCE).module())
        torch.testing.assert_close(compiled(x.clone()), kernelized(model, (x,)))


def test_ops_survive_a_pass_that_replaces_nodes():
    """A quantisation flow finds the linear layers and replaces them."""
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(model, (x,), mode=INFERENCE)
        want = kernelized(model, (x,))
    module = program.module()
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            with module.graph.inserting_before(node):
                low = torch.ops.aten.to.dtype
                given = [module.graph.call_function(low, (a, torch.bfloat16)) for a in node.args]
                made = module.graph.call_function(node.target, tuple(given))
                back = module.graph.call_function(low, (made, torch.float32))
            node.replace_all_uses_with(back)
            module.graph.erase_node(node)
    module.recompile()
    assert sum("hubkernels" in str(node.target) for node in module.graph.nodes) == 2
    torch.testing.assert_close(module(x), want, rtol=0.05, atol=0.05)


def test_program_can_be_copied_and_load_another_state():
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        module = export(model, (x,), mode=INFERENCE).module()
        other = Chain().eval()
        module.load_state_dict(other.state_dict())
        torch.testing.assert_close(copy.deepcopy(module)(x), kernelized(other, (x,)))


def test_program_of_torch_export_is_not_saved(tmp_path):
    model = Chain().eval()
    with only(Scale=OpaqueScale), torch.no_grad():
        kernelize(model, mode=INFERENCE | Mode.TORCH_COMPILE)
        program = torch.export.export(model, (torch.randn(3, 4),), strict=True)
    assert len(ops(program)) == 2
    with pytest.raises(ValueError, match=r"was not made by kernelgraph\.export: export the"):
        kernelgraph.save(program, tmp_path / "a.pt2")


# --- the data of ops ----------------------------------------------------------------------------


def spec_of_op(mode: Mode = INFERENCE) -> dict[str, Any]:
    """Return the data of an op as JSON."""
    with only(Scale=OpaqueScale):
        name = ops(export(Chain(), (torch.randn(3, 4),), mode=mode))[0]
    return dict(installed_ops()[name].op.spec)


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING], ids=str)
def test_data_of_an_op_comes_back_from_its_json(mode):
    data = spec_of_op(mode)
    spec = ProgramOpSpec.from_json(data)
    needed = [path for path, _ in spec.call.state.constants]
    assert spec.to_json(needed) == data
    assert (spec.flow is not None) is (mode is TRAINING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"take": ["code", "Scale"]}, "neither layer_name nor func_name"),
        ({"take": "Scale"}, "expected a JSON array"),
        ({"training": True}, "training is True, with flows None"),
        ({"flows": [[True], [True]]}, "training is False, with flows"),
        ({"writes": {"kernel": [-1], "layer": []}}, "are no numbers of operands"),
        ({"sizes": {"results": []}}, "no op has this data: KeyError: 'conditions'"),
        ({"call": None}, "expected a JSON object"),
    ],
)
def test_malformed_data_of_an_op_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ProgramOpSpec.from_json({**spec_of_op(), **changes})
