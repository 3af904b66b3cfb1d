"""Eager training: what a call does beside its result and its gradient is what the layer does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kernelgraph import last_report
from kernelgraph.report import Reason
from tests.support.effects import TRAINING, WIDTH, hidden_write, pair

OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"verify_gradients": False}, {"wrong_gradient": "reference"}],
    ids=["verified", "unverified", "reference"],
)


class Own(torch.autograd.Function):
    """Multiplies by a weight, with a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() * weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum_to_size(weight.shape)


def trains_alike(layer: Any, plain: Any, make: Any, steps: int = 3) -> None:
    """Compare results, gradients, inputs, state and the next random number of two layers."""
    for step in range(steps):
        found = []
        for one in (layer, plain):
            torch.manual_seed(step)
            leaf = torch.randn(3, WIDTH, requires_grad=True)
            args = make(leaf)
            output = one(*args)
            loss = output.square().sum()
            one.weight.grad = None
            loss.backward()
            found.append(
                [output, leaf.grad, one.weight.grad, args, dict(one.state_dict()), torch.rand(1)]
            )
        torch.testing.assert_close(*found)
    kept = {"forward", "_parameters", "_buffers"}
    ours, theirs = ({k: v for k, v in vars(one).items() if k not in kept} for one in (layer, plain))
    assert {k: v for k, v in ours.items() if type(v) in (int, list)} == {
        k: v for k, v in theirs.items() if type(v) in (int, list)
    }


def decision() -> Any:
    (found,) = last_report().decisions
    return found


# --- writes --------------------------------------------------------------------------------------


@OPTIONS
class TestWrites:
    def test_a_write_of_the_kernel_alone_is_seen_by_nobody(self, options: Any) -> None:
        def kernel(self: Any, x: Tensor) -> Tensor:
            hidden_write(x, x * self.weight)
            return x.detach().clone()

        layer, plain = pair(lambda self, x: x * self.weight, kernel, TRAINING, options)
        trains_alike(layer, plain, lambda leaf: (leaf * 1,))
        assert decision().uses_kernel == (options.get("wrong_gradient") is None)

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("forgets", [False, True])
    def test_running_statistics_are_updated_once(
        self, options: Any, own: bool, forgets: bool
    ) -> None:
        def statistics(self: Any, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.mean, self.var, training=True)

        def reference(self: Any, x: Tensor) -> Tensor:
            statistics(self, x)
            return x * self.weight

        def kernel(self: Any, x: Tensor) -> Tensor:
            if not forgets:
                statistics(self, x.detach())
            return Own.apply(x, self.weight) if own else (x * self.weight).detach()

        buffers = {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH)}
        layer, plain = pair(reference, kernel, TRAINING, options, **buffers)
        trains_alike(layer, plain, lambda leaf: (leaf * 1,))

    def test_a_buffer_that_the_kernel_updates_is_updated(self, options: Any) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            self.steps += 1
            return x * self.weight

        def kernel(self: Any, x: Tensor) -> Tensor:
            self.steps += 1
            return HidesSaves.apply(x, self.weight)

        layer, plain = pair(reference, kernel, TRAINING, options, steps=torch.zeros(1))
        trains_alike(layer, plain, lambda leaf: (leaf * 1,))

    def test_an_argument_that_both_write_into_is_written_once(self, options: Any) -> None:
        def reference(self: Any, x: Tensor, count: Tensor) -> Tensor:
            count.add_(1)
            return x * self.weight * count

        layer, plain = pair(reference, lambda self, x, c: reference(self, x, c), TRAINING, options)
        trains_alike(layer, plain, lambda leaf: (leaf * 1, torch.zeros(1)))

    def test_an_argument_that_requires_a_gradient_is_written_once(self, options: Any) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            return x.mul_(self.weight)

        def kernel(self: Any, x: Tensor) -> Tensor:
            hidden_write(x, x * self.weight)
            return x

        layer, plain = pair(reference, kernel, TRAINING, options)
        trains_alike(layer, plain, lambda leaf: (leaf * 1,))

    def test_two_arguments_that_share_memory_where_one_is_written(self, options: Any) -> None:
        def reference(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            a.add_(1)
            return x * self.weight + b

        def kernel(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            made = (x * self.weight + b).detach()
            a.add_(1)
            return made

        layer, plain = pair(reference, kernel, TRAINING, options)

        def make(leaf: Tensor) -> Any:
            a = torch.zeros(WIDTH)
            return leaf * 1, a, a[:]

        trains_alike(layer, plain, make)


class HidesSaves(Own):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.saved = x.detach(), weight.detach()
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved
        return grad * weight, (grad * x).sum_to_size(weight.shape)


# --- random numbers ------------------------------------------------------------------------------


@OPTIONS
class TestRandomness:
    @pytest.mark.parametrize("draws", ["both", "layer", "kernel"])
    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_a_call_that_draws_keeps_the_reference(
        self, options: Any, draws: str, own: bool, checkpointed: bool
    ) -> None:
        def forward(self: Any, x: Tensor, who: str) -> Tensor:
            if who in draws or draws == "both":
                return nn.functional.dropout(x, 0.5) * self.weight
            return x * self.weight

        def kernel(self: Any, x: Tensor) -> Tensor:
            if own:
                return forward(self, x, "kernel")
            return forward(self, x, "kernel").detach()

        layer, plain = pair(lambda self, x: forward(self, x, "layer"), kernel, TRAINING, options)

        def run(one: Any) -> Any:
            if not checkpointed:
                return one
            called = lambda x: checkpoint(one, x, use_reentrant=False)  # noqa: E731
            called.weight, called.state_dict = one.weight, one.state_dict  # type: ignore[attr-defined]
            return called

        trains_alike(run(layer), run(plain), lambda leaf: (leaf * 1,))
        assert decision().reason is Reason.UNSUITED
        assert "draws random numbers" in decision().detail


# --- transforms, containers and results ----------------------------------------------------------


def test_forward_mode_without_gradients_runs_the_reference() -> None:
    layer, _ = pair(
        lambda self, x: x * self.weight, lambda self, x: Own.apply(x, self.weight), TRAINING
    )
    x, tangent = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    layer(x).sum().backward()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            made = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
            torch.testing.assert_close(made.tangent, tangent * layer.weight)


def test_hessians_are_those_of_the_reference() -> None:
    layer, plain = pair(
        lambda self, x: x**3 * self.weight, lambda self, x: (x**3 * self.weight).detach(), TRAINING
    )
    x = torch.randn(WIDTH)
    layer(x.clone().requires_grad_()).sum().backward()
    made, wanted = (torch.func.hessian(lambda x, o=one: o(x).sum())(x) for one in (layer, plain))
    torch.testing.assert_close(made, wanted)


@OPTIONS
class TestContainers:
    @pytest.mark.parametrize("kind", ["same", "forgets"])
    def test_containers_among_the_arguments_are_written_once(self, options: Any, kind: str) -> None:
        def reference(self: Any, x: Tensor, cache: Any, outs: Any) -> Tensor:
            cache["k"] = x + 1
            outs.append(x * 2)
            return x * self.weight

        def kernel(self: Any, x: Tensor, cache: Any, outs: Any) -> Tensor:
            made = reference(self, x, cache, outs) if kind == "same" else x * self.weight
            return made.detach()

        layer, plain = pair(reference, kernel, TRAINING, options)
        trains_alike(layer, plain, lambda leaf: (leaf * 1, {}, []))

    def test_an_attribute_that_the_layer_sets_keeps_the_reference(self, options: Any) -> None:
        def count(self: Any, x: Tensor) -> Tensor:
            self.n_calls += 1
            self.log.append(len(x))
            return x * self.weight

        def kernel(self: Any, x: Tensor) -> Tensor:
            return count(self, x).detach()

        layer, plain = pair(count, kernel, TRAINING, options, n_calls=0)
        layer.log, plain.log = [], []
        trains_alike(layer, plain, lambda leaf: (leaf * 1,))
        assert decision().reason is Reason.UNSUITED
        assert "sets self.n_calls" in decision().detail

    def test_a_result_that_is_the_input_stays_so(self, options: Any) -> None:
        def reference(self: Any, x: Tensor, y: Tensor) -> Any:
            return x * self.weight, y

        def kernel(self: Any, x: Tensor, y: Tensor) -> Any:
            return (x * self.weight).detach(), y

        layer, plain = pair(reference, kernel, TRAINING, options)
        for _ in range(2):
            found = []
            for one in (layer, plain):
                x = torch.ones(WIDTH, requires_grad=True)
                y = torch.ones(WIDTH)
                made, same = one(x, y)
                same.mul_(3)
                made.sum().backward()
                found.append([made, y, x.grad])
            torch.testing.assert_close(*found)

    @pytest.mark.parametrize("kind", ["own", "hidden", "none"])
    def test_results_have_the_strides_of_the_layer(self, options: Any, kind: str) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            return (x * self.weight).t().contiguous().t()

        function = {"own": Own, "hidden": HidesSaves}.get(kind)

        def kernel(self: Any, x: Tensor) -> Tensor:
            return function.apply(x, self.weight) if function else (x * self.weight).detach()

        layer, plain = pair(reference, kernel, TRAINING, options)
        for _ in range(2):
            found = []
            for one in (layer, plain):
                x = torch.linspace(0, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()
                made = one(x).t().view(-1)
                made.square().sum().backward()
                found.append([made, x.grad])
            torch.testing.assert_close(*found)
        if kind != "none":
            assert decision().gradient == "kernel"


# --- weights with attributes, layers with an identity --------------------------------------------


@OPTIONS
@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_weights_may_carry_attributes(options: Any, quiet: bool, own: bool) -> None:
    def scale(weight: Any) -> Tensor:
        factor = getattr(weight, "quant_state", 1.0) if quiet else weight.quant_state
        return weight * factor

    def reference(self: Any, x: Tensor) -> Tensor:
        return x * scale(self.weight)

    def kernel(self: Any, x: Tensor) -> Tensor:
        made = reference(self, x)
        return made if own else made.detach()

    layer, plain = pair(reference, kernel, TRAINING, options)
    for one in (layer, plain):
        one.weight.quant_state = 3.0
    trains_alike(layer, plain, lambda leaf: (leaf * 1,))


class Rerun(torch.autograd.Function):
    """Keeps the layer, and runs it again in the backward, as tiled layers do."""

    @staticmethod
    def forward(ctx: Any, module: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x * module.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            weight = ctx.module.weight
            made = x * weight
        return None, *torch.autograd.grad(made, [x, weight], grad)


@OPTIONS
def test_a_kernel_may_run_its_layer_again_in_the_backward(options: Any) -> None:
    layer, plain = pair(
        lambda self, x: x * self.weight,
        lambda self, x: Rerun.apply(self, x, self.weight),
        TRAINING,
        options,
    )
    trains_alike(layer, plain, lambda leaf: (leaf * 1,))


@OPTIONS
@pytest.mark.parametrize("own", [False, True])
def test_parametrized_layers_train_within_a_cached_region(options: Any, own: bool) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    def kernel(self: Any, x: Tensor) -> Tensor:
        made = x * self.weight
        return made if own else made.detach()

    layer, plain = pair(lambda self, x: x * self.weight, kernel, TRAINING, options)
    from kernelgraph import kernelize
    from tests.support.toys import only

    for one in (layer, plain):
        nn.utils.parametrize.register_parametrization(one, "weight", Double())
    with only(Effect=type("Kernel", (nn.Module,), {"forward": kernel})):
        kernelize(layer, mode=TRAINING, **options)
    for _ in range(3):
        found = []
        for one in (layer, plain):
            one.zero_grad()
            x = torch.linspace(0, 1, WIDTH).requires_grad_()
            with nn.utils.parametrize.cached():
                made = one(x) + one(one(x * 1))
                made.sum().backward()
            with nn.utils.parametrize.cached():
                again = one(x)
            again.sum().backward()
            found.append([made, again, x.grad, *(p.grad for p in one.parameters())])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("grad", [False, True])
def test_replicas_of_data_parallel_models_run_on_their_own_weights(grad: bool) -> None:
    layer, _ = pair(lambda self, x: x * self.weight, lambda self, x: x * self.weight * 1, TRAINING)
    replica = layer._replicate_for_data_parallel()
    replica.weight = torch.full((WIDTH,), 7.0, requires_grad=grad)
    again = copy.deepcopy(layer)._replicate_for_data_parallel()
    again.weight = torch.full((WIDTH,), 9.0)
    for _ in range(2):
        x = torch.ones(WIDTH)
        assert torch.equal(replica(x), torch.full((WIDTH,), 7.0))
        assert torch.equal(again(x), torch.full((WIDTH,), 9.0))
        assert torch.equal(layer(x), layer.weight)
