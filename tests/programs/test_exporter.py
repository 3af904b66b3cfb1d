"""`kernelgraph.export`: which calls become ops, which do not, and how the model is left."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import kernelgraph
from kernelgraph import (
    LocalLayerRepository,
    Mode,
    export,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from kernelgraph.report import Reason
from tests.support.example_decoder import LAYERS, small, tokens
from tests.support.exporting import (
    BOTH,
    INFERENCE,
    TRAINING,
    in_fresh_process,
    kernelized,
    ops,
    reasons,
    untouched,
)
from tests.support.sources import import_example
from tests.support.toy_models import Chain, ForwardOnlyScale, OpaqueScale, Scale
from tests.support.toys import BrokenRepository, only

# --- the example models, with C++ kernels -------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    return import_example("decoder")


@BOTH
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
def test_decoder_is_exported_with_its_kernels(decoder, repository, experts, strict):
    """Batch and sequence stay dynamic through the ops. The experts cannot be traced themselves."""
    model = small(decoder, experts).eval()
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    dynamic = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=1, max=512)},)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        program = export(
            model, (tokens(2, 9),), mode=INFERENCE, dynamic_shapes=dynamic, strict=strict
        )
        assert set(reasons().values()) == {Reason.KERNEL}
        assert "blocks.1.mlp_norm" in reasons()
        assert len(ops(program)) == 7
        assert len(set(ops(program))) == 2
        module = program.module()
        for shape in ((2, 9), (5, 3), (1, 1)):
            ids = tokens(*shape)
            with torch.no_grad():
                torch.testing.assert_close(module(ids), kernelized(model, (ids,)))
    assert untouched(model)
    assert program.graph_signature.inputs_to_parameters.keys()
    assert {*program.state_dict} == {*model.state_dict()}


def test_native_lowering_traces_kernels_into_their_own_ops(decoder, repository, tmp_path):
    """The kernel's own ops are in the program, and are loaded with it."""
    model = small(decoder, 0).eval()
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    ids = tokens(2, 9)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        program = export(model, (ids,), mode=INFERENCE, lowering="native")
        want = kernelized(model, (ids,))
    assert len(ops(program)) == 5  # the norms, whose kernel cannot be traced
    own = [str(n.target) for n in program.graph.nodes if "silu_and_mul" in str(n.target)]
    assert len(own) == 2
    assert set(reasons().values()) == {Reason.KERNEL}
    torch.testing.assert_close(program.module()(ids), want)
    kernelgraph.save(program, tmp_path / "a.pt2", bundle=True)
    trusted = {"trust_remote_code": True}
    loads = [(tmp_path / "a.pt2", "load", options) for options in ({}, trusted)]
    refused, answer = in_fresh_process(ids, loads, tmp_path)
    assert "pass trust_remote_code=True" in refused["error"]
    assert refused["imported"] == []
    torch.testing.assert_close(torch.tensor(answer["result"]), want)
    kernelgraph.save(kernelgraph.load(tmp_path / "a.pt2", **trusted), tmp_path / "b.pt2")


# --- which calls become ops ---------------------------------------------------------------------


@BOTH
def test_strict_and_non_strict_export_make_the_same_op(strict):
    x = (torch.randn(3, 4),)
    with only(Scale=OpaqueScale):
        names = {
            name
            for s in (False, strict)
            for name in ops(export(Chain(), x, mode=INFERENCE, strict=s))
        }
    assert len(names) == 1


@BOTH
def test_model_without_kernels_is_exported_as_by_torch(strict):
    model, x = Chain().eval(), (torch.randn(3, 4),)
    with only():
        program = export(model, x, mode=INFERENCE, strict=strict)
    assert set(reasons().values()) == {Reason.NO_LAYER}
    assert ops(program) == []
    plain = torch.export.export(model, x, strict=strict)
    targets = [
        [str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in (program, plain)
    ]
    assert targets[0] == targets[1]
    torch.testing.assert_close(program.module()(*x), model(*x))


@BOTH
def test_policy_never_keeps_every_reference(strict):
    with only(Scale=OpaqueScale):
        program = export(
            Chain(), (torch.randn(3, 4),), mode=INFERENCE, strict=strict, policy="never"
        )
    assert ops(program) == []
    assert set(reasons().values()) == {Reason.POLICY}


@BOTH
def test_kernel_without_backward_is_not_exported_for_training(strict):
    with only(Scale=ForwardOnlyScale):
        program = export(Chain(), (torch.randn(3, 4),), mode=TRAINING, strict=strict)
    assert set(reasons().values()) == {Reason.NO_BACKWARD}
    assert ops(program) == []


@BOTH
@pytest.mark.parametrize("mode", [INFERENCE, INFERENCE | Mode.TORCH_COMPILE], ids=str)
def test_kernelized_layer_keeps_its_kernel(strict, mode):
    """The mapping during the export does not matter."""
    model, x = Chain().eval(), (torch.randn(3, 4),)
    with only(Scale=OpaqueScale):
        kernelize(model, mode=mode)
        want = model(*x)
    before = {path: vars(m).get("forward") for path, m in model.named_modules()}
    with only():
        program = export(model, x, mode=INFERENCE, strict=strict)
    assert {path: vars(m).get("forward") for path, m in model.named_modules()} == before
    assert len(ops(program)) == 2
    torch.testing.assert_close(program.module()(*x), want.detach())


@BOTH
def test_own_forward_and_refused_condition_keep_the_reference(strict):
    class Picky(Scale):
        kernel_layer_name = "Scale"
        kernel_condition = staticmethod(lambda module: module.eps == 0.25)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(Picky(), Picky(), Scale()).eval()
    model[1].eps = 0.5
    own = model[2].forward = lambda x: x * 7
    with only(Scale=OpaqueScale):
        program = export(model, (torch.randn(3, 4),), mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    assert reasons()["0"] is Reason.KERNEL
    assert reasons()["1"] is Reason.CONDITION
    assert reasons()["2"] is Reason.OWN_FORWARD
    assert vars(model[2])["forward"] is own


@BOTH
def test_layers_inside_a_layer_without_kernel_become_ops(strict):
    @use_kernel_forward_from_hub("Outer")
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    model, x = nn.Sequential(Outer()).eval(), (torch.randn(3, 4),)
    with only(Scale=OpaqueScale):
        program = export(model, x, mode=INFERENCE, strict=strict)
        want = kernelized(model, x)
    assert len(ops(program)) == 2
    torch.testing.assert_close(program.module()(*x), want)


@use_kernel_forward_from_hub("Double")
def double(x: Tensor) -> Tensor:
    return x * 2


class OpaqueDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2 + 10)


@use_kernelized_func(double)
class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x) + 1


@BOTH
def test_extensible_function_becomes_an_op(strict):
    with only(Double=OpaqueDouble):
        program = export(Doubles(), (torch.ones(3),), mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(torch.ones(3)), torch.full((3,), 13.0))
    assert "forward" not in vars(double)


@BOTH
def test_model_that_is_itself_a_layer_becomes_an_op(strict):
    x = torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(Scale().eval(), (), {"x": x}, mode=INFERENCE, strict=strict)
        want = kernelized(Scale(), (x,))
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(x=x), want)


def test_kernels_are_chosen_for_the_given_device():
    with only(Scale=OpaqueScale):
        assert len(ops(export(Chain(), (torch.randn(3, 4),), mode=INFERENCE, device="cpu"))) == 2
        assert ops(export(Chain(), (torch.randn(3, 4),), mode=INFERENCE, device="xpu")) == []
    assert set(reasons().values()) == {Reason.NO_DEVICE}


# --- errors -------------------------------------------------------------------------------------


@BOTH
def test_failed_export_leaves_the_model_as_it_was(strict):
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = Chain()

        def forward(self, x: Tensor) -> Tensor:
            y = self.chain(x)
            return y if y.sum().item() > 0 else x

    model = Fails()
    kernel = kernelize(Chain(), mode=INFERENCE)
    model.chain.layers[0].__dict__.update(vars(kernel.layers[0]).get("forward") or {})
    with only(Scale=OpaqueScale), pytest.raises(Exception):  # noqa: B017, PT011 (torch's own)
        export(model, (torch.randn(3, 4),), mode=INFERENCE, strict=strict)
    assert untouched(model)
    with only(Scale=BrokenRepository()), pytest.raises(Exception, match="out of reach"):
        export(Chain(), (torch.randn(3, 4),), mode=INFERENCE, strict=strict)
    # Nothing is left that another export or compile would see.
    assert torch.export.export(Chain(), (torch.randn(3, 4),), strict=strict)


def test_bad_arguments_are_refused():
    x = (torch.randn(3, 4),)
    with pytest.raises(TypeError, match=r"export takes an nn\.Module, not 3"):
        export(3, x, mode=INFERENCE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"INFERENCE or TRAINING|FALLBACK"):
        export(Chain(), x, mode=Mode.FALLBACK)
    with pytest.raises(ValueError, match="policy is one of always, never, not 'fast'"):
        export(Chain(), x, mode=INFERENCE, policy="fast")
    with pytest.raises(ValueError, match="lowering is one of op, native, not 'asm'"):
        export(Chain(), x, mode=INFERENCE, lowering="asm")
    with pytest.raises(ValueError, match="is for non-strict export: pass strict=False"):
        export(Chain(), x, mode=INFERENCE, lowering="native", strict=True)
    with pytest.raises(ValueError, match="unknown device type"):
        export(Chain(), x, mode=INFERENCE, device="toaster")
