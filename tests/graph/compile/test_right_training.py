"""A compiled program that differentiates does with right kernels what it does without them."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from kernelgraph import (
    Mode,
    Tracer,
    replace_kernel_forward_from_hub,
    rewrite,
    use_kernel_mapping,
)
from tests.support.right_programs import Program, assert_changes_nothing
from tests.support.toy_models import on_cpu

INNER = ["eager", "aot_eager", "inductor"]


class Layer(nn.Module):
    """Has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


def program(
    forward: Any, kernel: Any, run: Any, inputs: Any = None, keeps: str = "", base: type = Layer
) -> Program:
    return Program(
        type("Made", (base,), {"forward": forward}),
        kernel,
        run,
        inputs or (lambda: [torch.arange(6.0).view(2, 3) + 1]),
        keeps,
    )


# --- transforms ----------------------------------------------------------------------------------


def weighted(self, x):
    return (x * self.weight).sin()


def weighted_otherwise(self, x):
    return torch.sin(self.weight * x)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.from_numpy((x.detach() * weight.detach()).numpy()).sin()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        inner = given * (x * weight).cos()
        return inner * weight, (inner * x).sum_to_size(weight.shape)


def weighted_by_function(self, x):
    return Sine.apply(x, self.weight)


def scanned(m, x):
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, row: (m(carry) + row, carry * 2), x[0], x)


def mapped(m, x):
    from torch._higher_order_ops.map import map as map_op

    return map_op(m, x)


def conditional(m, x):
    return torch.cond(x.sum() > 0, lambda v: m(v), lambda v: v * 2, (x,))


def looped(m, x):
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(
        lambda i, v: i < 3, lambda i, v: (i + 1, m(v).detach()), (torch.tensor(0), x.detach())
    )


def ensemble(m, x):
    weights = {"weight": torch.stack([m.weight, m.weight * 2])}
    return vmap(lambda state: functional_call(m, state, (x,)))(weights)


def forward_mode(m, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


KEPT = "a transform of torch.func"
TRANSFORMS = {
    "grad": lambda m, x: grad(lambda v: m(v).sum())(x),
    "vmap": lambda m, x: vmap(m)(x),
    "jvp": lambda m, x: jvp(m, (x,), (torch.ones_like(x),)),
    "jacrev": lambda m, x: jacrev(m)(x),
    "hessian": lambda m, x: hessian(lambda v: m(v).sum())(x),
    "gradients per sample": lambda m, x: vmap(grad(lambda v: m(v).sum()))(x),
    "ensemble": ensemble,
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("inner", INNER[:2])
@pytest.mark.parametrize("wanted", [False, True])
def test_transforms_differentiate_the_layer(name, kernel, inner, wanted):
    made = program(weighted, kernel, TRANSFORMS[name], keeps=KEPT)
    assert_changes_nothing(made, inner, grad=wanted)


CONTROL_FLOW = {"scan": scanned, "map": mapped, "cond": conditional, "while_loop": looped}


@pytest.mark.parametrize("name", CONTROL_FLOW)
@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("inner", INNER[:2])
@pytest.mark.parametrize("wanted", [False, True])
def test_control_flow_differentiates_the_layer(name, kernel, inner, wanted):
    if inner == "inductor" and name in ("scan", "map"):
        pytest.skip("Inductor of torch 2.13 cannot compile these, with or without a kernel")
    keeps = "inside of" if wanted else ""
    assert_changes_nothing(
        program(weighted, kernel, CONTROL_FLOW[name], keeps=keeps), inner, grad=wanted
    )


@contextlib.contextmanager
def calls_of(forward, kernel, inner, *, grads=True):
    """A layer, and the same compiled with a kernel."""
    torch.compiler.reset()
    layer = type("Made", (Layer,), {"forward": forward})
    plain = layer().requires_grad_(grads)
    replace_kernel_forward_from_hub(layer, "Layer")
    right = type("Right", (nn.Module,), {"forward": kernel})
    with use_kernel_mapping(on_cpu(Layer=right), inherit_mapping=False):
        yield plain, torch.compile(plain, backend="hubkernels", options={"inner": inner})


def batched_gradients(f, x):
    return torch.autograd.grad(f(x), x, torch.eye(6).view(6, 2, 3), is_grads_batched=True)


@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_of_a_compiled_call_may_be_batched(kernel, inner):
    with calls_of(weighted, kernel, inner) as (plain, compiled):
        x = torch.ones(2, 3, requires_grad=True)
        for _ in range(2):
            assert_close(batched_gradients(compiled, x), batched_gradients(plain, x))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("grads", [False, True])
def test_compiled_call_may_be_transformed(name, kernel, grads):
    with calls_of(weighted, kernel, "eager", grads=grads) as (plain, compiled):
        x = torch.ones(2, 3)
        plain(x), compiled(x)
        if name != "ensemble":
            assert_close(TRANSFORMS[name](compiled, x), TRANSFORMS[name](plain, x))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING])
def test_rewritten_graph_may_be_transformed(name, kernel, mode):
    if name in ("ensemble", "forward mode"):
        pytest.skip("a graph has no weights to pass; an op has no forward mode, and says so")
    layer = type("Made", (Layer,), {"forward": weighted})
    replace_kernel_forward_from_hub(layer, "Layer")
    right = type("Right", (nn.Module,), {"forward": kernel})
    plain, x = nn.Sequential(layer()), torch.ones(2, 3)
    graph = fx.GraphModule(plain, Tracer().trace(plain))
    with use_kernel_mapping(on_cpu(Layer=right), inherit_mapping=False):
        made = rewrite(graph, mode=mode, example_inputs=(x,))
    assert "hubkernels" in str(made.graph)
    assert_close(TRANSFORMS[name](made, x), TRANSFORMS[name](plain, x))


@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("wanted", [False, True])
def test_layer_in_a_nested_region_keeps_its_kernel(kernel, inner, wanted):
    def run(m, x):
        region = torch.compiler.nested_compile_region(m)
        return region(region(x))

    assert_changes_nothing(program(weighted, kernel, run), inner, grad=wanted)


# --- kernels that keep their layer ---------------------------------------------------------------


class Again(torch.autograd.Function):
    """Runs a forward again in its backward, as tiled layers do."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return (x * layer.weight).sin()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        weight = ctx.layer.weight.detach().requires_grad_()
        with torch.enable_grad():
            y = (x * weight).sin()
        return None, *torch.autograd.grad(y, (x, weight), given)


def weighted_again(self, x):
    return Again.apply(self, x, self.weight)


class Tiled(torch.autograd.Function):
    """Lets autograd add to the gradients of the layer's weights itself, tile by tile."""

    @staticmethod
    def forward(ctx: Any, compute: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.cat([compute(tile) for tile in x.chunk(2)])

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        made = []
        for tile, grads in zip(ctx.saved_tensors[0].chunk(2), given.chunk(2), strict=True):
            tile = tile.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.compute(tile), grads)
            made.append(tile.grad)
        return None, torch.cat(made), None


def weighted_by_tiles(self, x):
    return Tiled.apply(functools.partial(weighted, self), x, self.weight)


PACKED: dict[Any, Tensor] = {}
WEAKLY_PACKED: Any = weakref.WeakKeyDictionary()


def packed_under(key, packed, weight):
    if key not in packed:
        packed[key] = weight.detach() * 1
    return packed[key]


def packs_by_layer(self, x):
    return torch.sin(packed_under(self, PACKED, self.weight) * x)


def packs_by_layer_weakly(self, x):
    return torch.sin(packed_under(self, WEAKLY_PACKED, self.weight) * x)


def packs_by_identity(self, x):
    return torch.sin(packed_under(id(self), PACKED, self.weight) * x)


def packs_by_hash(self, x):
    return torch.sin(packed_under(hash(self), PACKED, self.weight) * x)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kernel", [weighted_again, weighted_by_tiles])
def test_kernel_may_read_its_layer_in_its_backward(kernel, inner, wanted):
    made = program(weighted, kernel, lambda m, x: m(m(x)))
    assert_changes_nothing(made, inner, grad=wanted)


@pytest.mark.parametrize(
    "kernel", [packs_by_layer, packs_by_layer_weakly, packs_by_identity, packs_by_hash]
)
@pytest.mark.parametrize("wanted", [False, True])
def test_kernel_that_packs_weights_by_layer_gives_way(kernel, wanted, caplog):
    layer = type("Made", (Layer,), {"forward": weighted})
    second = layer()

    def run(m, x):
        with torch.no_grad():
            second.weight.copy_(m.weight * 2)
        return m(x), second(x)

    replace_kernel_forward_from_hub(layer, "Layer")
    made = Program(layer, kernel, run, lambda: [torch.arange(6.0).view(2, 3)])
    assert_changes_nothing(made, "aot_eager", grad=wanted)
    assert "keeps the layer" in caplog.text
    made.keeps = "keeps the layer"  # the next compile knows it
    assert_changes_nothing(made, "inductor", grad=wanted)


# --- a backward that uses autograd ---------------------------------------------------------------


class ByAutograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        x, weight = (v.detach().requires_grad_() for v in ctx.saved_tensors)
        with torch.enable_grad():
            y = (x * weight).sin()
            return torch.autograd.grad(y, (x, weight), given)


def weighted_by_autograd(self, x):
    return ByAutograd.apply(x, self.weight)


@pytest.mark.parametrize("inner", INNER)
def test_backward_may_use_autograd(inner):
    made = program(weighted, weighted_by_autograd, lambda m, x: m(m(x)))
    assert_changes_nothing(made, inner, grad=True, calls=3)


# --- weights that carry attributes ---------------------------------------------------------------


class Quantized(nn.Module):
    """Has a weight with a scale that is an attribute of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.weight.quant_state = {"scale": torch.tensor(2.0)}


def dequantized(self, x):
    return x * (self.weight * self.weight.quant_state["scale"])


def dequantized_otherwise(self, x):
    return (self.weight.quant_state["scale"] * self.weight) * x


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("wanted", [False, True])
def test_weight_that_carries_attributes_keeps_the_reference(inner, wanted):
    made = program(
        dequantized, dequantized_otherwise, lambda m, x: m(x), keeps="quant_state", base=Quantized
    )
    assert_changes_nothing(made, inner, grad=wanted)


# --- operands after the call ---------------------------------------------------------------------


def plus_sine(self, x):
    return x + self.weight.sin()


def plus_sine_otherwise(self, x):
    return torch.sin(self.weight) + x


def plus_sine_natively(self, x):
    return torch.from_numpy(x.detach().numpy() + self.weight.detach().sin().numpy())


def written_after_the_call(m, x):
    y = x * 1
    z = m(y)
    y.mul_(3)
    return z, y


def view_written_after_the_call(m, x):
    y = x * 1
    z = m(y[:1])
    y[0] = 3
    return z, checkpoint(m, y, use_reentrant=False)


def also_in_a_checkpoint(m, x):
    return m(x), checkpoint(m, x, use_reentrant=False)


@pytest.mark.parametrize("kernel", [plus_sine_otherwise, plus_sine_natively])
@pytest.mark.parametrize("run", [written_after_the_call, view_written_after_the_call])
@pytest.mark.parametrize("inner", INNER)
def test_operand_may_be_written_after_the_call(kernel, run, inner):
    made = program(plus_sine, kernel, run)
    assert_changes_nothing(made, inner, grad=True)


@pytest.mark.parametrize("kernel", [weighted_otherwise, weighted_by_function])
@pytest.mark.parametrize("inner", INNER)
def test_layer_may_be_called_in_and_outside_of_a_checkpoint(kernel, inner):
    made = program(weighted, kernel, also_in_a_checkpoint)
    assert_changes_nothing(made, inner, grad=True)


# --- what a recomputed gradient leaves behind ----------------------------------------------------


class Counting(Layer):
    """Has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))


def normalized(self, x):
    return F.batch_norm(x, self.mean, self.var, self.weight, training=True)


def normalized_otherwise(self, x):
    mean, var = x.mean(0), x.var(0, unbiased=False)
    with torch.no_grad():
        self.mean.mul_(0.9).add_(mean * 0.1)
        self.var.mul_(0.9).add_(x.var(0) * 0.1)
    return (x - mean) / (var + 1e-5).sqrt() * self.weight


def normalized_opaquely(self, x):
    with torch.no_grad():
        self.calls.numpy()[...] += 1
    return F.batch_norm(x, self.mean, self.var, self.weight, training=True)


def normalized_opaquely_otherwise(self, x):
    with torch.no_grad():
        self.calls.add_(1)
    return normalized_otherwise(self, x)


RECOMPUTED = {
    "batch norm": (normalized, normalized_otherwise),
    "native code": (normalized_opaquely, normalized_opaquely_otherwise),
}


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.parametrize("inner", INNER)
def test_recomputed_gradient_leaves_buffers_alone(name, inner):
    made = program(*RECOMPUTED[name], lambda m, x: m(m(x)), base=Counting)
    assert_changes_nothing(made, inner, grad=True)
