"""``kernelgraph.export``: what becomes an op, what does not, and what is left as it was."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kernelgraph
from kernelgraph import (
    LocalLayerRepository,
    Mode,
    export,
    kernelize,
    last_report,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from kernelgraph.programs.program_ops import ops_in
from kernelgraph.report import Reason
from tests.examples.test_decoder import LAYERS, small, tokens
from tests.support.exporting import in_fresh_process
from tests.support.sources import import_example
from tests.support.toy_models import Chain, ForwardOnlyScale, OpaqueScale, Scale, TraceableScale
from tests.support.toys import BrokenRepository, only

BOTH = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


def ops(program: ExportedProgram) -> list[str]:
    """The kernels' ops in a program, in their order."""
    return [name for name, _ in ops_in(program)]


def reasons() -> dict[str, Reason]:
    report = last_report()
    assert report is not None
    return {d.path: d.reason for d in report.decisions}


def kernelized(model: nn.Module, x: Any, mode: Mode = INFERENCE) -> Any:
    with torch.no_grad():
        return kernelize(copy.deepcopy(model), mode=mode, device="cpu")(*x)


def untouched(model: nn.Module) -> bool:
    return not [m for m in model.modules() if "forward" in vars(m)]


# --- the example models, with C++ kernels -------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    return import_example("decoder")


@BOTH
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "experts"])
def test_a_decoder_with_its_kernels_baked_in(decoder, repository, experts, strict):
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


def test_kernels_that_can_be_traced(decoder, repository, tmp_path):
    """As they say of themselves: their own ops are in the program, and load with it."""
    model = small(decoder, 0).eval()
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    ids = tokens(2, 9)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        program = export(model, (ids,), mode=INFERENCE, lowering="native")
        want = kernelized(model, (ids,))
    assert len(ops(program)) == 5  # the norms, which do not
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


# --- what becomes an op -------------------------------------------------------------------------


@BOTH
def test_the_two_ways_of_tracing_make_the_same_op(strict):
    x = (torch.randn(3, 4),)
    with only(Scale=OpaqueScale):
        names = {
            name
            for s in (False, strict)
            for name in ops(export(Chain(), x, mode=INFERENCE, strict=s))
        }
    assert len(names) == 1


@BOTH
def test_what_has_no_kernel_is_exported_as_ever(strict):
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
def test_a_policy_of_never(strict):
    with only(Scale=OpaqueScale):
        program = export(
            Chain(), (torch.randn(3, 4),), mode=INFERENCE, strict=strict, policy="never"
        )
    assert ops(program) == []
    assert set(reasons().values()) == {Reason.POLICY}


@BOTH
def test_a_kernel_without_a_backward_is_not_for_training(strict):
    with only(Scale=ForwardOnlyScale):
        program = export(Chain(), (torch.randn(3, 4),), mode=TRAINING, strict=strict)
    assert set(reasons().values()) == {Reason.NO_BACKWARD}
    assert ops(program) == []


@BOTH
@pytest.mark.parametrize("mode", [INFERENCE, INFERENCE | Mode.TORCH_COMPILE], ids=str)
def test_a_kernelized_layer_keeps_its_kernel(strict, mode):
    """Whatever the mapping is by then."""
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
def test_a_forward_of_ones_own_and_a_condition(strict):
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
def test_layers_inside_of_a_layer_that_keeps_its_reference(strict):
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
def test_functions_are_layers_too(strict):
    with only(Double=OpaqueDouble):
        program = export(Doubles(), (torch.ones(3),), mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(torch.ones(3)), torch.full((3,), 13.0))
    assert "forward" not in vars(double)


@BOTH
def test_the_model_itself_may_be_the_layer(strict):
    x = torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(Scale().eval(), (), {"x": x}, mode=INFERENCE, strict=strict)
        want = kernelized(Scale(), (x,))
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(x=x), want)


@use_kernel_forward_from_hub("Counted")
class Counted(nn.Module):
    """Counts its calls in a buffer, and gives several results in a dict."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, by: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        return {"half": x / 2, "rest": [x * by, None]}


class OpaqueCounted(nn.Module):
    def forward(self, x: Tensor, by: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        return {"half": torch.from_numpy(x.numpy() / 2), "rest": [x * by + 10, None]}


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def forward(self, x: Tensor) -> Any:
        made = self.counted(x, by=3.0)
        return made["half"] + 1, self.counted(x)["rest"][0]


@BOTH
def test_what_a_layer_writes_is_written(strict):
    x = (torch.randn(3, 4),)
    with only(Counted=OpaqueCounted):
        program = export(Counts().eval(), x, mode=INFERENCE, strict=strict)
    module = program.module()
    for _ in range(2):
        half, rest = module(*x)
        torch.testing.assert_close(half, x[0] / 2 + 1)
        torch.testing.assert_close(rest, x[0] + 10)
    assert dict(module.named_buffers())["counted.calls"].item() == 4


@BOTH
def test_autocast_around_a_layer(strict):
    class Product(nn.Module):
        kernel_layer_name = "Product"

        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    class OpaqueProduct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy()) @ x + 10

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = Product()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.product(x)

    model, x = Cast().eval(), (torch.randn(4, 4),)
    with only(Product=OpaqueProduct), torch.no_grad():
        program = export(model, x, mode=INFERENCE, strict=strict)
        assert program.module()(*x).dtype is torch.bfloat16
        torch.testing.assert_close(program.module()(*x), kernelized(model, x))
    assert len(ops(program)) == 1


@BOTH
def test_sizes_that_depend_on_values(strict):
    def sizes(self: nn.Module, x: Tensor) -> Tensor:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size())

    @use_kernel_forward_from_hub("Positive", fake=sizes)
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0]

    class OpaquePositive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy()[x.numpy() > 0]) + 10

    model = nn.Sequential(Positive(), nn.ReLU())
    with only(Positive=OpaquePositive):
        program = export(model, (torch.randn(8),), mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    x = torch.tensor([1.0, -1, 2, -2, 3, 4, -5, 6])
    torch.testing.assert_close(program.module()(x), x[x > 0] + 10)


# --- what travels without the model's code ------------------------------------------------------


class Helped(Scale):
    kernel_layer_name = "Scale"

    def helper(self, x: Tensor) -> Tensor:
        return x + self.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x) * self.weight


class UsesHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x) * 2


@BOTH
def test_a_kernel_that_calls_the_models_code_cannot_travel(strict):
    with only(Scale=UsesHelper):
        program = export(
            nn.Sequential(Helped()), (torch.randn(3, 4),), mode=INFERENCE, strict=strict
        )
    assert ops(program) == []
    report = last_report()
    assert report is not None
    assert "the kernel uses self.helper, which is code of the model's" in report.decisions[0].detail


@BOTH
def test_what_only_the_layer_needs_of_the_models_code_does_not_matter(strict):
    """Its own forward may use any function of the model's: it is not what runs elsewhere."""

    class Activated(Scale):
        kernel_layer_name = "Scale"

        def __init__(self) -> None:
            super().__init__()
            self.act = kernelized_relu

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * self.weight

    with only(Scale=OpaqueScale):
        program = export(
            nn.Sequential(Activated()), (torch.randn(3, 4),), mode=INFERENCE, strict=strict
        )
    assert len(ops(program)) == 1


def kernelized_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


@BOTH
def test_classes_of_torch_stay_what_they_are(strict):
    class Act(nn.Module):
        kernel_layer_name = "Act"

        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU()
            self.sizes = {"a": (1, 2.5), "b": [torch.float32]}

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) * self.sizes["a"][1]

    class OpaqueAct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(torch.from_numpy(x.numpy()))
            return (y * self.sizes["a"][1]).to(self.sizes["b"][0]) + 10

    model, x = nn.Sequential(Act()), (torch.randn(3, 4),)
    with only(Act=OpaqueAct):
        program = export(model, x, mode=INFERENCE, strict=strict)
    assert len(ops(program)) == 1
    torch.testing.assert_close(program.module()(*x), model(*x) + 10)


# --- training -----------------------------------------------------------------------------------


@BOTH
def test_a_program_for_training_has_the_layers_gradient(strict):
    model, x = Chain(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        program = export(model, (x,), mode=TRAINING, strict=strict)
        mode = TRAINING | Mode.TORCH_COMPILE
        eager = kernelize(copy.deepcopy(model), mode=mode, verify_gradients=False)
        compiled = torch.compile(eager, backend="aot_eager")
        module = program.module()
        found = []
        for run in (module, compiled):
            inputs = x.clone().requires_grad_()
            run(inputs).square().sum().backward()
            found.append([inputs.grad, *(p.grad for _, p in sorted(run.named_parameters()))])
    assert len(ops(program)) == 2
    assert all(name.endswith("_training") for name in ops(program))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert all(g is not None and g.abs().sum() > 0 for g in found[0])


def test_a_layer_that_cannot_be_traced_has_no_gradient_to_bake_in():
    class Busy(Scale):
        kernel_layer_name = "Scale"

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum().item() > 0 else x

    model = nn.Sequential(Busy())
    with only(Scale=TraceableScale):
        assert len(ops(export(model, (torch.randn(3, 4),), mode=INFERENCE))) == 1
        with pytest.raises(
            ValueError, match=r"own forward, which cannot be traced .*: export it for"
        ):
            export(model, (torch.randn(3, 4),), mode=TRAINING)


# --- what a program is good for -----------------------------------------------------------------


def test_what_walks_and_changes_graphs_keeps_working():
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
    """A kernel of no other test's: Inductor has not met its op."""


def test_inductor_in_ci(monkeypatch):
    """There it stops at an op that has a decomposition, as ONNX's export needs it to have."""
    monkeypatch.setenv("CI", "true")
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=InNumpy), torch.no_grad():
        compiled = torch.compile(export(model, (x,), mode=INFERENCE).module())
        torch.testing.assert_close(compiled(x.clone()), kernelized(model, (x,)))


def test_a_pass_over_the_graph():
    """What a quantisation flow does: it finds the linear layers, and puts others in their place."""
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


def test_copies_and_pickles_of_the_state():
    model, x = Chain().eval(), torch.randn(3, 4)
    with only(Scale=OpaqueScale):
        module = export(model, (x,), mode=INFERENCE).module()
        other = Chain().eval()
        module.load_state_dict(other.state_dict())
        torch.testing.assert_close(copy.deepcopy(module)(x), kernelized(other, (x,)))


# --- what goes wrong ----------------------------------------------------------------------------


@BOTH
def test_the_model_is_left_as_it_was_where_it_cannot_be_exported(strict):
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
    # And nothing is left that another export or compile would see.
    assert torch.export.export(Chain(), (torch.randn(3, 4),), strict=strict)


@BOTH
def test_the_error_of_a_kernel_names_it(strict):
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"no {x.numpy().shape}")

    model = Chain()  # only of a model that is still there can it be told where in it
    with only(Scale=Raises):
        program = export(model, (torch.randn(3, 4),), mode=INFERENCE, strict=strict)
    where = r"kernel tests@\w+: Raises, called for layer Scale at (one of )?layers\.0"
    with pytest.raises(RuntimeError, match=where):
        program.module()(torch.randn(3, 4))


def test_bad_arguments():
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


def test_the_device_can_be_asked_for():
    with only(Scale=OpaqueScale):
        assert len(ops(export(Chain(), (torch.randn(3, 4),), mode=INFERENCE, device="cpu"))) == 2
        assert ops(export(Chain(), (torch.randn(3, 4),), mode=INFERENCE, device="xpu")) == []
    assert set(reasons().values()) == {Reason.NO_DEVICE}


def test_a_program_that_was_not_exported_here_is_not_saved(tmp_path):
    model = Chain().eval()
    with only(Scale=OpaqueScale), torch.no_grad():
        kernelize(model, mode=INFERENCE | Mode.TORCH_COMPILE)
        program = torch.export.export(model, (torch.randn(3, 4),), strict=True)
    assert len(ops(program)) == 2
    with pytest.raises(ValueError, match=r"was not made by kernelgraph\.export: export the"):
        kernelgraph.save(program, tmp_path / "a.pt2")
