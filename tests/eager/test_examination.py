"""The first call of a form without a gradient: what a kernel does beside its result."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kernelgraph import last_report
from kernelgraph.report import Reason
from tests.support.effects import INFERENCE, TRAINING, WIDTH, hidden_write, layer_of, pair

MODES = pytest.mark.parametrize("mode", [INFERENCE, TRAINING], ids=str)


def kept(words: str = "") -> bool:
    """Whether the layer of the last report keeps its reference, for a reason with these words."""
    (decision,) = last_report().decisions
    assert (decision.reason is Reason.UNSUITED) == (decision.kernel == "")
    return decision.kernel == "" and words in decision.detail


@pytest.fixture(autouse=True, params=[torch.no_grad, torch.inference_mode])
def _no_gradients(request: pytest.FixtureRequest) -> Any:
    with request.param():
        yield


# --- writes --------------------------------------------------------------------------------------


def rotate(self: Any, q: Tensor) -> Tensor:
    return q * self.weight


def rotate_in_place(self: Any, q: Tensor) -> Tensor:
    hidden_write(q, q * self.weight)
    return q


def rotate_in_place_where_transposed(self: Any, q: Tensor) -> Tensor:
    if q.is_contiguous():
        return q * self.weight
    return rotate_in_place(self, q)


@MODES
class TestWrites:
    @pytest.mark.parametrize("kernel", [rotate_in_place, rotate_in_place_where_transposed])
    def test_a_write_of_the_kernel_alone_is_seen_by_nobody(self, mode: Any, kernel: Any) -> None:
        layer, plain = pair(rotate, kernel, mode)
        for _ in range(3):
            for q in (torch.randn(3, 2, WIDTH), torch.randn(3, 2, WIDTH).transpose(0, 1)):
                before, result = q.clone(), layer(q)
                assert torch.equal(q, before)
                torch.testing.assert_close(result, plain(q))
                result.zero_()
                assert torch.equal(q, before)
        assert not kept()

    def test_a_write_of_both_happens_once(self, mode: Any) -> None:
        layer, plain = pair(rotate_in_place, rotate_in_place, mode)
        for _ in range(3):
            q = torch.randn(3, WIDTH)
            made, wanted = q.clone(), q.clone()
            torch.testing.assert_close(layer(made), plain(wanted))
            torch.testing.assert_close(made, wanted)
        assert not kept()

    def test_a_write_that_the_kernel_lacks_keeps_the_reference(self, mode: Any) -> None:
        layer, plain = pair(rotate_in_place, rotate, mode)
        for _ in range(3):
            q = torch.randn(3, WIDTH)
            made, wanted = q.clone(), q.clone()
            torch.testing.assert_close(layer(made), plain(wanted))
            torch.testing.assert_close(made, wanted)
        assert kept("does not write into q")

    def test_a_write_into_the_layer_by_the_kernel_alone_keeps_the_reference(
        self, mode: Any
    ) -> None:
        def scribble(self: Any, q: Tensor) -> Tensor:
            made = q * self.weight
            hidden_write(self.weight, torch.zeros(WIDTH))
            return made

        layer, plain = pair(rotate, scribble, mode)
        for _ in range(3):
            q = torch.randn(3, WIDTH)
            torch.testing.assert_close(layer(q), plain(q))
        assert torch.equal(layer.weight, plain.weight)
        assert kept("writes into self.weight")

    def test_running_statistics_are_updated_once(self, mode: Any) -> None:
        def normalize(self: Any, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)

        def forget(self: Any, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, None, None, training=True)

        for kernel in (normalize, forget):
            buffers = {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH)}
            layer, plain = pair(normalize, kernel, mode, **buffers)
            for _ in range(3):
                x = torch.randn(8, WIDTH)
                torch.testing.assert_close(layer(x), plain(x))
                torch.testing.assert_close(layer.state_dict(), plain.state_dict())
            assert kept("does not write into self.mean") == (kernel is forget)

    def test_a_write_inside_of_a_container_keeps_the_reference(self, mode: Any) -> None:
        def reference(self: Any, parts: Any) -> Tensor:
            return parts["q"] * self.weight

        def kernel(self: Any, parts: Any) -> Tensor:
            return rotate_in_place(self, parts["q"])

        layer, _ = pair(reference, kernel, mode)
        for _ in range(2):
            parts = {"q": torch.ones(WIDTH)}
            torch.testing.assert_close(layer(parts), layer.weight.data)
            assert torch.equal(parts["q"], torch.ones(WIDTH))
        assert kept("writes into parts['q']")

    def test_a_write_into_one_of_two_arguments_that_share_memory(self, mode: Any) -> None:
        def reference(self: Any, a: Tensor, b: Tensor) -> Tensor:
            a.mul_(self.weight)
            return a + b

        def kernel(self: Any, a: Tensor, b: Tensor) -> Tensor:
            made = a * self.weight + b
            a.mul_(self.weight)
            return made

        layer, plain = pair(reference, kernel, mode)
        for _ in range(2):
            for shares in (False, True, False):
                found = []
                for one in (layer, plain):
                    a = torch.linspace(1, 2, 2 * WIDTH).view(2, WIDTH)
                    b = a.view(2, WIDTH) if shares else torch.ones(2, WIDTH)
                    found.append([one(a, b), a, b])
                torch.testing.assert_close(*found)
        assert not kept()

    def test_views_of_one_tensor_that_do_not_overlap_share_nothing(self, mode: Any) -> None:
        calls: list[str] = []

        def reference(self: Any, q: Tensor, k: Tensor) -> Tensor:
            q.mul_(2)
            return q + k

        def kernel(self: Any, q: Tensor, k: Tensor) -> Tensor:
            calls.append("kernel")
            q.mul_(2)
            return q + k

        layer, plain = pair(reference, kernel, mode)
        for count in range(1, 4):
            qk = torch.randn(3, 2 * WIDTH)
            wanted = plain(*qk.clone().chunk(2, -1))
            torch.testing.assert_close(layer(*qk.chunk(2, -1)), wanted)
            assert len(calls) == count + 1


# --- random numbers ------------------------------------------------------------------------------


def draw(self: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(x, self.p, self.training)


def draw_more(self: Any, x: Tensor) -> Tensor:
    torch.rand(3)
    return x * 1


def draw_of_python(self: Any, x: Tensor) -> Tensor:
    return x * (1 if random.random() < 2 else 0)


@MODES
class TestRandomness:
    @pytest.mark.parametrize(
        ("reference", "kernel"),
        [
            (draw, draw),
            (draw, lambda self, x: nn.functional.dropout(x.clone(), self.p, self.training)),
            (draw, lambda self, x: x * 1),
            (lambda self, x: x * 1, draw_more),
            (draw_of_python, lambda self, x: x * 1),
            (draw_of_python, draw_of_python),
        ],
    )
    def test_a_call_that_draws_keeps_the_reference(
        self, mode: Any, reference: Any, kernel: Any
    ) -> None:
        layer, plain = pair(reference, kernel, mode, p=0.5)
        found: list[list[Any]] = []
        for one in (layer, plain):
            torch.manual_seed(3)
            random.seed(3)
            x = torch.ones(8, WIDTH)
            found.append([one(x), one(x), torch.rand(2), torch.tensor(random.random())])
        torch.testing.assert_close(*found)
        assert kept("draws random numbers")

    def test_a_layer_draws_only_while_it_trains(self, mode: Any) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            return draw(self, x) * 1

        layer, plain = pair(reference, lambda self, x: x + 10, mode, p=0.5)
        x = torch.ones(8, WIDTH)
        layer.eval()
        plain.eval()
        assert torch.equal(layer(x), x + 10)
        layer.train()
        plain.train()
        for one in (layer, plain):
            torch.manual_seed(3)
            one.made = one(x)
        assert torch.equal(layer.made, plain.made)
        layer.eval()
        layer.p = 0.25
        assert torch.equal(layer(x), x + 10)

    def test_a_generator_among_the_arguments_is_drawn_from_once(self, mode: Any) -> None:
        def reference(self: Any, x: Tensor, generator: Any) -> Tensor:
            return x + torch.rand(WIDTH, generator=generator)

        layer, plain = pair(reference, reference, mode)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        for _ in range(3):
            made, wanted = (
                one(torch.ones(WIDTH), g) for one, g in zip((layer, plain), generators, strict=True)
            )
            assert torch.equal(made, wanted)
        assert kept("draws random numbers")


# --- transforms ----------------------------------------------------------------------------------


@MODES
class TestTransforms:
    def test_forward_mode_runs_the_reference(self, mode: Any) -> None:
        if torch.is_inference_mode_enabled():
            pytest.skip("there is no forward mode in inference mode")
        layer, _ = pair(rotate, lambda self, q: (q * self.weight).detach().clone(), mode)
        x, tangent = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
        for _ in range(2):
            with forward_ad.dual_level():
                made = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
                torch.testing.assert_close(made.tangent, tangent * layer.weight)
            layer(x)

    def test_transforms_of_torch_func_run_the_reference(self, mode: Any) -> None:
        def opaque(self: Any, q: Tensor) -> Tensor:
            return torch.from_numpy(q.detach().numpy() * self.weight.detach().numpy())

        layer, plain = pair(rotate, opaque, mode)
        x, tangent = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
        for _ in range(2):
            torch.testing.assert_close(layer(x), plain(x))
            for transform in (
                lambda one: torch.func.jvp(one, (x,), (tangent,)),
                lambda one: torch.func.vmap(one)(x),
                lambda one: torch.func.grad(lambda q: one(q).sum())(x),
                lambda one: torch.func.jacrev(one)(x[0]),
                lambda one: torch.func.jacfwd(one)(x[0]),
                lambda one: torch.func.vjp(one, x)[1](tangent),
            ):
                torch.testing.assert_close(transform(layer), transform(plain))


# --- containers and attributes -------------------------------------------------------------------


@dataclasses.dataclass
class Cache:
    key: Any = None
    log: list[Any] = dataclasses.field(default_factory=list)


def into_containers(self: Any, x: Tensor, cache: Any, outs: Any, data: Any) -> Tensor:
    cache["k"] = x + 1
    outs.append({"x": x * 2})
    data.key = len(outs)
    data.log.append(x * 3)
    return x * self.weight


def flat(value: Any) -> Any:
    """Return a value with plain dicts for dataclasses."""
    if isinstance(value, Cache):
        return vars(value)
    return value


@MODES
class TestContainers:
    @pytest.mark.parametrize("forgets", [False, True])
    def test_containers_among_the_arguments_are_written_once(
        self, mode: Any, forgets: bool
    ) -> None:
        kernel = (
            (lambda self, x, cache, outs, data: x * self.weight) if forgets else into_containers
        )
        layer, plain = pair(into_containers, kernel, mode)
        given: list[Any] = [({}, [], Cache()) for _ in range(2)]
        for _ in range(3):
            x = torch.randn(3, WIDTH)
            made, wanted = (one(x, *g) for one, g in zip((layer, plain), given, strict=True))
            torch.testing.assert_close(made, wanted)
            (made, wanted) = ([*map(flat, g)] for g in given)
            torch.testing.assert_close(made, wanted)
        assert kept("cache") == forgets

    @pytest.mark.parametrize("forgets", [False, True])
    def test_attributes_that_the_layer_sets_are_set_once(self, mode: Any, forgets: bool) -> None:
        def count(self: Any, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(x.shape)
            self.last = x
            return x * self.weight

        layer, plain = pair(count, rotate if forgets else count, mode, calls=0, log=[])
        layer.log, plain.log = [], []
        for n in range(1, 4):
            x = torch.randn(n, WIDTH)
            torch.testing.assert_close(layer(x), plain(x))
            assert (layer.calls, layer.log, layer.last is x) == (n, plain.log, True)
        assert kept("self.") == forgets

    def test_a_kernel_may_keep_what_it_packs_on_the_layer(self, mode: Any) -> None:
        def pack(self: Any, x: Tensor) -> Tensor:
            if not hasattr(self, "packed"):
                self.packed = self.weight.detach() * 2
            return x * self.packed / 2

        layer, plain = pair(rotate, pack, mode)
        x = torch.randn(3, WIDTH)
        for _ in range(2):
            torch.testing.assert_close(layer(x), plain(x))
        assert not kept()

    def test_a_kernel_may_keep_what_it_packs_by_layer(self, mode: Any) -> None:
        packed: dict[int, Tensor] = {}

        def pack(self: Any, x: Tensor) -> Tensor:
            if id(self) not in packed:
                packed[id(self)] = self.weight.detach() * 2
            return x * packed[id(self)] / 2

        layers = [pair(rotate, pack, mode)[0] for _ in range(2)]
        for n in range(1, 9):
            for k, layer in enumerate(layers):
                if n == 1:
                    layer.weight.mul_(k + 1)
                x = torch.randn(n, WIDTH)
                torch.testing.assert_close(layer(x), x * layer.weight)
        # One for each layer, and one for its copy, which no other object can be taken for.
        assert len(packed) == 4

    def test_classes_and_globals_do_not_count_other_runs(self, mode: Any) -> None:
        seen: list[int] = []

        def count(self: Any, x: Tensor) -> Tensor:
            type(self).calls += 1
            type(self).log.append(len(x))
            seen.append(len(x))
            return x * self.weight

        layer, _ = pair(count, count, mode)
        type(layer).calls, type(layer).log = 0, []
        for n in range(1, 4):
            layer(torch.randn(2, WIDTH))
            assert (type(layer).calls, type(layer).log, seen) == (n, [2] * n, [2] * n)


# --- results -------------------------------------------------------------------------------------


@MODES
class TestResults:
    def test_a_result_that_is_the_input_in_the_kernel_alone_is_copied(self, mode: Any) -> None:
        layer, _ = pair(lambda self, x: x * 1, lambda self, x: x, mode)
        for _ in range(2):
            x = torch.ones(WIDTH)
            layer(x).zero_()
            assert torch.equal(x, torch.ones(WIDTH))
        assert not kept()

    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(-1), lambda x: x[1:]])
    def test_a_result_that_is_the_input_in_the_layer_stays_so(self, mode: Any, view: Any) -> None:
        reference = lambda self, x: view(x)  # noqa: E731
        for kernel in (reference, lambda self, x: view(x).clone()):
            layer, plain = pair(reference, kernel, mode)
            for _ in range(2):
                made, wanted = torch.ones(3, WIDTH), torch.ones(3, WIDTH)
                layer(made).zero_()
                plain(wanted).zero_()
                assert torch.equal(made, wanted)
            assert kept("returns") == (kernel is not reference)

    def test_results_that_share_memory_in_the_kernel_alone_are_separate(self, mode: Any) -> None:
        def kernel(self: Any, x: Tensor) -> Any:
            made = x * 2
            return made, [made]

        layer, _ = pair(lambda self, x: (x * 2, [x + x]), kernel, mode)
        for _ in range(2):
            first, (second,) = layer(torch.ones(WIDTH))
            first.zero_()
            assert torch.equal(second, torch.full((WIDTH,), 2.0))

    def test_results_have_the_strides_of_the_layer(self, mode: Any) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            return x.transpose(1, 2) * 2

        layer, plain = pair(reference, lambda self, x: reference(self, x).contiguous(), mode)
        for _ in range(2):
            x = torch.randn(2, 3, WIDTH)
            made, wanted = (one(x).transpose(1, 2).view(-1) for one in (layer, plain))
            torch.testing.assert_close(made, wanted)
        assert not kept()

    @pytest.mark.parametrize(
        "kernel",
        [
            lambda self, x: (x * 2,),
            lambda self, x: (x * 2).double(),
            lambda self, x: (x * 2)[:, None],
            lambda self, x: None,
        ],
    )
    def test_a_result_of_another_form_keeps_the_reference(self, mode: Any, kernel: Any) -> None:
        layer, plain = pair(lambda self, x: x * 2, kernel, mode)
        for _ in range(2):
            x = torch.ones(3, WIDTH)
            torch.testing.assert_close(layer(x), plain(x))
        assert kept("returns")

    def test_a_layer_that_returns_nothing_runs_its_kernel(self, mode: Any) -> None:
        calls: list[str] = []

        def kernel(self: Any, x: Tensor, out: Tensor) -> None:
            calls.append("kernel")
            out.copy_(x * 2)

        layer, _ = pair(lambda self, x, out: (out.copy_(x * 2), None)[1], kernel, mode)
        for count in range(1, 4):
            out = torch.empty(WIDTH)
            assert layer(torch.ones(WIDTH), out) is None
            assert torch.equal(out, torch.full((WIDTH,), 2.0))
            assert len(calls) == count + 1
        assert not kept()


# --- the rest of a program -----------------------------------------------------------------------


@MODES
class TestFirstCall:
    def test_a_reference_that_raises_leaves_the_kernel(self, mode: Any) -> None:
        def reference(self: Any, x: Tensor) -> Tensor:
            raise NotImplementedError

        layer, _ = pair(reference, rotate, mode)
        for _ in range(2):
            assert torch.equal(layer(torch.ones(WIDTH)), layer.weight)
        assert not kept()

    def test_an_error_of_the_kernel_is_raised(self, mode: Any) -> None:
        def kernel(self: Any, x: Tensor) -> Tensor:
            raise ArithmeticError("the kernel fails")

        layer, _ = pair(rotate, kernel, mode)
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="the kernel fails"):
                layer(torch.ones(WIDTH))

    def test_a_form_is_examined_once(self, mode: Any) -> None:
        calls: list[str] = []

        def kernel(self: Any, q: Tensor) -> Tensor:
            calls.append("kernel")
            return q * self.weight

        layer, _ = pair(rotate, kernel, mode)
        for shape, count in [((2, WIDTH), 2), ((2, WIDTH), 3), ((3, WIDTH), 5), ((2, WIDTH), 6)]:
            layer(torch.randn(shape))
            assert len(calls) == count
        copy.deepcopy(layer)(torch.randn(2, WIDTH))
        assert len(calls) == 7

    def test_a_flag_of_the_layer_may_become_anything(self, mode: Any) -> None:
        layer, plain = pair(rotate, rotate, mode, flag=None, number=1)
        q = torch.randn(3, WIDTH)
        for value in (None, [1], 3, torch.ones(2), {"a": 1}, True):
            layer.flag = layer.number = value
            torch.testing.assert_close(layer(q), plain(q))

    def test_hooks_of_submodules_run_once(self, mode: Any) -> None:
        inner, seen = nn.Linear(WIDTH, WIDTH), []
        layer, _ = pair(
            lambda self, x: self.inner(x),
            lambda self, x: x @ self.inner.weight.t(),
            mode,
            inner=inner,
        )
        layer.inner.register_forward_hook(lambda *_: seen.append("hook"))
        for count in range(1, 4):
            layer(torch.randn(3, WIDTH))
            assert len(seen) == count
        assert kept("hooks of inner")

    def test_version_counters_of_the_caller_stay(self, mode: Any) -> None:
        layer, _ = pair(rotate, rotate_in_place, mode)
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(WIDTH, requires_grad=True)
            q = torch.ones(3, WIDTH)
            loss = (x * q).sum()
        layer(q)
        loss.backward()
        assert torch.equal(x.grad, torch.full((WIDTH,), 3.0))

    def test_parametrized_layers_run_within_a_cached_region(self, mode: Any) -> None:
        class Double(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * 2

        layer, plain = (layer_of(rotate) for _ in range(2))
        from kernelgraph import kernelize
        from tests.support.toys import only

        for one in (layer, plain):
            nn.utils.parametrize.register_parametrization(one, "weight", Double())
        with only(Effect=type("Kernel", (nn.Module,), {"forward": rotate})):
            kernelize(layer, mode=mode)
        x = torch.randn(3, WIDTH)
        for _ in range(2):
            with nn.utils.parametrize.cached():
                torch.testing.assert_close([layer(x), layer(x)], [plain(x), plain(x)])
                held = set(nn.utils.parametrize._cache)
                assert held <= {(id(one), "weight") for one in (layer, plain)}

    def test_fake_and_meta_tensors_pass(self, mode: Any) -> None:
        layer, _ = pair(rotate, rotate, mode)
        assert layer.to("meta")(torch.ones(3, WIDTH, device="meta")).shape == (3, WIDTH)
