"""``policy="fastest"``: what is chosen, by programs that take as long as they say."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernelgraph
from kernelgraph import (
    LocalLayerRepository,
    Mode,
    _version,
    kernelize,
    keys,
    last_report,
    use_kernel_mapping,
)
from kernelgraph import cache as disk
from kernelgraph.graph.autotune import candidates, contest, records, samplers, tuning_keys
from kernelgraph.graph.autotune.benchmark import MARGIN
from kernelgraph.graph.lowering.options import Options
from kernelgraph.report import Reason
from tests.support.costs import CLOCK, Odd, Steps, StepsAtOnce, Work, kernel
from tests.support.toy_models import Repository
from tests.support.toy_repository import write_repository

TRACEABLE = """
import torch

class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = {gradient}
        return grad * weight, (grad * x).sum(0)

class Traceable(torch.nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x):
        return torch.ops.kernelgraph_tests_costs.spend(Times.apply(x, self.weight) + 1, 0.5)
"""
FASTEST = {"policy": "fastest", "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(samplers, "clock", CLOCK)
    records.forget()


def mapping(**layers: Any) -> Any:
    """A mapping from layer names to a hub layer, or to what is registered for each mode."""
    made = {
        name: {"cpu": {m: Repository(k) for m, k in what.items()}}
        if isinstance(what, dict)
        else {"cpu": Repository(what)}
        for name, what in layers.items()
    }
    return use_kernel_mapping(made, inherit_mapping=False)


def compiled(model: nn.Module, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(
        model, backend="hubkernels", fullgraph=fullgraph, options={**FASTEST, **options}
    )


def stack(*seconds: float) -> nn.Module:
    """Layers with linear ones between them."""
    layers = [layer for s in seconds for layer in (Work(s), nn.Linear(4, 4))]
    return nn.Sequential(*layers).eval()


class InTurn(nn.Module):
    """Calls a layer with each of some keyword arguments."""

    def __init__(self, *flags: dict[str, Any]) -> None:
        super().__init__()
        self.layer = Steps()
        self.flags = flags

    def forward(self, x: Tensor) -> Tensor:
        for flags in self.flags:
            x = self.layer(x, **flags)
        return x


def run(model: nn.Module, x: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = compiled(model, **options)(torch.zeros(3, 4) if x is None else x)
    return made


def reasons() -> list[Reason]:
    report = last_report()
    assert report is not None
    return [decision.reason for decision in report.decisions]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are measured from now on."""
    found: list[str] = []
    own = contest.Contest.winner

    def winner(self: Any) -> Any:
        found.append(self.layer_name)
        return own(self)

    monkeypatch.setattr(contest.Contest, "winner", winner)
    return found


class TestChoice:
    @pytest.mark.parametrize(
        ("seconds", "used"),
        [(0.5, True), (2.0, False), (1.0, False), (1.0 - MARGIN / 2, False)],
        ids=["faster", "slower", "as fast", "hardly faster"],
    )
    def test_the_faster_is_used(self, seconds, used):
        model = stack(1.0)[:1]
        with mapping(Work=kernel(seconds)):
            assert torch.equal(run(model), torch.full((3, 4), 11.0 if used else 1.0))
        assert reasons() == [Reason.KERNEL if used else Reason.SLOWER]
        assert "kernel" in last_report().decisions[0].detail
        assert f"{1e3 * seconds:.3g} ms" in str(last_report())

    def test_each_kind_of_call_on_its_own(self):
        with mapping(Work=kernel(0.5)):
            run(stack(1.0, 0.1, 1.0))
        assert reasons() == [Reason.KERNEL, Reason.SLOWER, Reason.KERNEL]

    def test_other_sizes_are_another_kind(self, monkeypatch):
        found = counted(monkeypatch)
        model = stack(1.0)
        with mapping(Work=kernel(0.5)):
            run(model, torch.zeros(3, 4))
            run(model, torch.zeros(5, 4))
            run(model, torch.zeros(3, 4, dtype=torch.float64).float())
        assert found == ["Work", "Work"]

    @pytest.mark.parametrize(
        "flags",
        [[{"slow": False}, {"slow": True}], [{"times": 1}, {"times": 3}], [{}, {"how": "slowly"}]],
        ids=["a flag", "a number", "a name"],
    )
    def test_constants_are_part_of_a_kind(self, flags):
        """What they are may decide what is fastest."""
        with mapping(Steps=StepsAtOnce):
            assert torch.equal(run(InTurn(*flags).eval()), torch.full((3, 4), 1.0 + 11.0))
        assert reasons() == [Reason.SLOWER, Reason.KERNEL]
        takes = [kept["about"]["takes"] for kept in disk.values(disk.CHOICES)]
        wanted = [[f"{k}={v!r}" for k, v in each.items()] for each in flags]
        assert sorted(takes) == sorted(", ".join(["float32[3x4]", *each]) for each in wanted)

    def test_how_large_a_float_is_matters_not(self, monkeypatch):
        found = counted(monkeypatch)
        with mapping(Steps=StepsAtOnce):
            run(InTurn({"scale": 1.0}, {"scale": 2.0}).eval())
        assert found == ["Steps"]

    def test_nor_that_it_varies(self, monkeypatch):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = Steps()

            def forward(self, x, scale):
                return self.layer(x, scale=scale * 2)

        found, model, x = counted(monkeypatch), Scaled().eval(), torch.zeros(3, 4)
        with mapping(Steps=StepsAtOnce), torch.no_grad():
            made = compiled(model)
            for scale in (1.0, 2.0, 3.0, 4.0):
                assert torch.equal(made(x, scale), torch.full((3, 4), 2 * scale))
        assert found == ["Steps"]

    def test_equal_calls_of_a_deep_model_are_measured_once(self, monkeypatch):
        found = counted(monkeypatch)
        with mapping(Work=kernel(0.5)):
            run(stack(*[1.0] * 8))
        assert found == ["Work"]
        assert reasons() == [Reason.KERNEL] * 8

    def test_of_several_kernels_the_fastest(self):
        kernels = {
            Mode.INFERENCE | Mode.TORCH_COMPILE: kernel(0.8, 10),
            Mode.FALLBACK: kernel(0.4, 20),
        }
        with mapping(Work=kernels):
            assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 21.0))
        assert "Kernel20" in last_report().decisions[0].kernel

    @pytest.mark.parametrize("grad", [False, True])
    def test_of_several_kernels_with_state_of_their_own(self, grad):
        """The second reads what neither the layer nor the first does; compiled by Inductor."""

        class First(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.kernelgraph_tests_costs.spend(x * self.weight + 1, 0.9)

        class Second(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.kernelgraph_tests_costs.spend(x * self.weight + self.one, 0.2)

        model = stack(1.0)[:1]
        model[0].register_buffer("one", torch.ones(4))
        mode = Mode.TRAINING if grad else Mode.INFERENCE
        with mapping(Work={mode | Mode.TORCH_COMPILE: First, Mode.FALLBACK: Second}):
            out = (
                compiled(model, inner="inductor")(torch.zeros(3, 4))
                if grad
                else run(model, inner="inductor")
            )
        assert torch.equal(out, torch.ones(3, 4))
        assert "Second" in last_report().decisions[0].kernel
        if grad:
            out.sum().backward()
            assert torch.equal(model[0].weight.grad, torch.zeros(4))

    def test_another_kernel_that_cannot_be_used_is_no_candidate(self, caplog):
        class Impure(nn.Module):
            def __init__(self) -> None:
                super().__init__()

            def forward(self, x: Tensor) -> Tensor:
                return x

        kernels = {Mode.INFERENCE | Mode.TORCH_COMPILE: kernel(0.8), Mode.FALLBACK: Impure}
        with mapping(Work=kernels), caplog.at_level(logging.INFO, "kernelgraph"):
            assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
        assert "is no candidate for Work" in caplog.text

    def test_a_kernel_that_is_traced_is_a_candidate(self, monkeypatch):
        """As an op it costs more here, and so it is in the graph as what it does."""
        own = candidates.program

        def program(region: Any, untuned: Any, candidate: Any) -> Any:
            made = own(region, untuned, candidate)
            return Slowly(made) if candidate.implementation is records.Implementation.OP else made

        class Slowly(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *inputs: Any) -> Any:
                CLOCK.now += 0.2
                return self.inner(*inputs)

        monkeypatch.setattr(candidates, "program", program)
        graphs: list[Any] = []

        def inner(graph_module: Any, inputs: Any) -> Any:
            graphs.append(graph_module)
            return graph_module.forward if hasattr(graph_module, "graph") else graph_module

        with mapping(Work=kernel(0.5, can_torch_compile=True)):
            assert torch.equal(run(stack(1.0)[:1], inner=inner), torch.full((3, 4), 11.0))
        assert "hubkernels" not in str(graphs[-1].graph)
        assert "spend" in str(graphs[-1].graph)
        assert last_report().decisions[0].detail.startswith("traced; kernel traced 500 ms")

    @pytest.mark.parametrize("verify", [True, False])
    def test_what_is_to_be_verified_is_no_candidate_traced(self, verify):
        with mapping(Work=kernel(0.5, plus=0, can_torch_compile=True)):
            run(stack(1.0)[:1], verify=verify)
        assert ("traced" in last_report().decisions[0].detail) is not verify

    def test_layers_in_the_reference_of_one_that_keeps_it(self):
        @kernelgraph.use_kernel_forward_from_hub("Outer")
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.work = Work(1.0)

            def forward(self, x: Tensor) -> Tensor:
                return self.work(x)

        class Slow(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return spend_slowly(x) + 100

        with mapping(Outer=Slow, Work=kernel(0.5)):
            assert torch.equal(run(nn.Sequential(Outer())), torch.full((3, 4), 11.0))
        assert sorted(str(reason) for reason in reasons()) == sorted(
            map(str, [Reason.SLOWER, Reason.KERNEL])
        )

    def test_what_was_kernelized_keeps_its_kernel(self):
        model = stack(1.0)[:1]
        with mapping(Work=kernel(5.0)):
            kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE)
            assert torch.equal(run(model), torch.full((3, 4), 11.0))

    def test_sizes_that_vary_count_as_they_are_now(self):
        with mapping(Work=kernel(0.5)):
            model = torch.compile(
                stack(1.0)[:1], backend="hubkernels", dynamic=True, options=FASTEST
            )
            with torch.no_grad():
                assert model(torch.zeros(6, 4)).shape == (6, 4)
                assert torch.equal(model(torch.zeros(9, 4)), torch.full((9, 4), 11.0))
        assert reasons() == [Reason.KERNEL]


def spend_slowly(x: Tensor) -> Tensor:
    return torch.ops.kernelgraph_tests_costs.spend(x, 50.0)


class TestTheFinalGraph:
    def test_what_lost_leaves_no_trace(self):
        """It is the graph that there would be without any kernel."""
        graphs: list[str] = []

        def inner(graph_module: Any, inputs: Any) -> Any:
            graphs.append(str(graph_module.graph))
            return graph_module.forward

        model = stack(1.0, 1.0)
        with mapping(Work=kernel(2.0)):
            run(model, inner=inner)
        torch.compiler.reset()
        with use_kernel_mapping({}, inherit_mapping=False):
            run(model, inner=inner)
        assert graphs[-1] == graphs[-2]


class TestTraining:
    def test_forward_and_backward_count(self):
        """The kernel is faster forward, and its backward makes it slower."""

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(x, weight)
                return torch.ops.kernelgraph_tests_costs.spend(x * weight + 1, 0.1)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                x, weight = ctx.saved_tensors
                torch.ops.kernelgraph_tests_costs.spend(grad, 5.0)
                return grad * weight, (grad * x).sum(0)

        class SlowBackward(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Function.apply(x, self.weight)

        model = stack(1.0)[:1]
        with mapping(Work=SlowBackward):
            run(model)
            assert reasons() == [Reason.KERNEL]
            out = compiled(model, inner="aot_eager")(torch.randn(3, 4))
        assert reasons() == [Reason.SLOWER]
        out.sum().backward()
        assert model[0].weight.grad is not None

    def test_a_backward_that_is_tried_or_timed_runs_in_the_thread_that_traces(self):
        """A device's own thread would wait for the lock that this one has, if it compiles."""
        apart: list[bool] = []

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(x, weight)
                return x * weight + 1

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                apart.append(not torch._C._is_multithreading_enabled())
                x, weight = ctx.saved_tensors
                return grad * weight, (grad * x).sum(0)

        class Kernel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return Function.apply(x, self.weight)

        with mapping(Work=Kernel):
            out = compiled(stack(1.0)[:1], inner="aot_eager")(torch.randn(3, 4))
        assert apart
        assert all(apart)
        apart.clear()
        out.sum().backward()
        assert apart == [False]

    def test_a_kernel_that_wins_trains(self):
        torch.manual_seed(0)
        model = stack(1.0)[:1]
        x = torch.randn(3, 4)
        with mapping(Work=kernel(0.5, plus=0.0)):
            compiled(model, inner="aot_eager")(x).square().sum().backward()
        assert reasons() == [Reason.KERNEL]
        found, model[0].weight.grad = model[0].weight.grad, None
        model(x).square().sum().backward()
        torch.testing.assert_close(found, model[0].weight.grad)

    @pytest.mark.parametrize("wrong", [True, False])
    def test_a_kernel_is_traced_only_with_true_gradients(self, tmp_path, monkeypatch, wrong):
        """What is traced has the gradient of its own ops, which nothing stands in for."""
        source = TRACEABLE.format(gradient="grad * 7" if wrong else "grad")
        files = {"__init__.py": "from . import layers\n", "layers.py": source}
        write_repository(tmp_path / "kernels", files)
        repository = LocalLayerRepository(tmp_path / "kernels", layer_name="Traceable")
        own = candidates.program

        def program(region: Any, untuned: Any, candidate: Any) -> Any:
            made = own(region, untuned, candidate)
            if candidate.implementation is records.Implementation.OP:  # which costs more here
                node = next(n for n in made.graph.nodes if n.op == "output")
                with made.graph.inserting_before(node):
                    first = made.graph.call_function(
                        torch.ops.kernelgraph_tests_costs.spend, (node.args[0][0], 0.3)
                    )
                node.args = ((first, *node.args[0][1:]),)
                made.recompile()
            return made

        monkeypatch.setattr(candidates, "program", program)
        torch.manual_seed(0)
        model, x = stack(1.0)[:1], torch.randn(3, 4)
        kernels = {"Work": {"cpu": repository}}
        with use_kernel_mapping(kernels, inherit_mapping=False):
            out = compiled(model, inner="aot_eager")(x)
        out.square().sum().backward()
        # With the layer run again for its gradient, the kernel costs more than the layer.
        assert reasons() == [Reason.SLOWER if wrong else Reason.KERNEL]
        assert ("traced" in last_report().decisions[0].detail) is not wrong
        found, model[0].weight.grad = model[0].weight.grad, None
        model(x).square().sum().backward()
        torch.testing.assert_close(found, model[0].weight.grad)

    @pytest.mark.parametrize(("seconds", "reason"), [(0.5, Reason.KERNEL), (9.0, Reason.SLOWER)])
    def test_in_a_checkpointed_block(self, seconds, reason):
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.work, self.linear = Work(1.0), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = checkpoint(lambda x: self.linear(self.work(x)), x, use_reentrant=False)
                return torch.relu(y)

        torch.manual_seed(0)
        model, x = Block(), torch.randn(3, 4)
        with mapping(Work=kernel(seconds, plus=0)):
            out = compiled(model, inner="aot_eager")(x)
        out.sum().backward()
        assert reasons() == [reason]
        assert "not measured" not in last_report().decisions[0].detail
        found, model.work.weight.grad = model.work.weight.grad, None
        model(x).sum().backward()
        torch.testing.assert_close(found, model.work.weight.grad)


class TestUntraceable:
    def test_the_kernel_wins_unmeasured_where_the_graph_may_not_break(self):
        with mapping(Odd=kernel(5.0)):
            out = run(nn.Sequential(Odd(1.0)), inner="aot_eager")
        assert torch.equal(out, torch.full((3, 4), 11.0))
        assert "cannot be traced" in last_report().decisions[0].detail

    @pytest.mark.parametrize(("seconds", "used"), [(0.5, True), (5.0, False)])
    def test_elsewhere_it_is_measured_against_the_layer_run_eagerly(self, seconds, used):
        with mapping(Odd=kernel(seconds)):
            out = run(nn.Sequential(Odd(1.0)), fullgraph=False, inner="aot_eager")
        assert torch.equal(out, torch.full((3, 4), 11.0 if used else 1.0))

    def test_the_report_says_why_a_layer_that_breaks_the_graph_keeps_its_reference(self):
        """Dynamo traces it for itself then, and gives the backend no graph of it."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.before = nn.Sequential(nn.Linear(4, 4), Odd(0.5))
                self.unknown = nn.ModuleList([Steps()])
                self.after = Work()

            def forward(self, x):
                return self.unknown[0](self.after(self.before(x)))

        with mapping(Odd=kernel(2.0), Work=kernel(0.5)):
            run(Net().eval(), fullgraph=False)
        found = {d.path: (d.layer, d.reason) for d in last_report().decisions}
        assert found == {
            "before.1": ("Odd", Reason.SLOWER),
            "after": ("Work", Reason.KERNEL),
            "unknown.0": ("Steps", Reason.NO_LAYER),
        }

    def test_a_layer_that_breaks_graphs_is_not_chosen_where_they_may_not_break(self):
        """Whatever was chosen where they may."""
        model = nn.Sequential(Odd(1.0))
        with mapping(Odd=kernel(5.0)):
            broken = run(model, fullgraph=False, inner="aot_eager")
            torch.compiler.reset()
            whole = run(model, inner="aot_eager")
        assert torch.equal(broken, torch.full((3, 4), 1.0))
        assert torch.equal(whole, torch.full((3, 4), 11.0))


class TestByRule:
    def test_when_the_time_is_over(self):
        """Elementwise layers keep their references; others, and unknown ones, take the kernel."""

        @kernelgraph.use_kernel_forward_from_hub("Norm")
        class Norm(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (x - x.mean(-1, keepdim=True)) / (x.float().std() + 1).to(x.dtype)

        @kernelgraph.use_kernel_forward_from_hub("Product")
        class Product(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x @ x.transpose(0, 1) @ x

        model = nn.Sequential(Norm(), Product(), Work())
        own = kernel(0.5)
        with mapping(Norm=own, Product=own, Work=own):
            run(model, measure_seconds=0)
        assert reasons() == [Reason.POLICY, Reason.KERNEL, Reason.KERNEL]
        details = [d.detail for d in last_report().decisions]
        assert all("not measured: the 0 s for measuring were over" in d for d in details)
        assert disk.entries() == {}  # nobody else is to believe it

    def test_more_time_is_asked_for_anew(self):
        model = stack(1.0)[:1]
        with mapping(Work=kernel(2.0)):
            run(model, measure_seconds=0)
            assert reasons() == [Reason.KERNEL]
            torch.compiler.reset()
            run(model)
            assert reasons() == [Reason.SLOWER]

    def test_out_of_memory_loses_nothing(self, monkeypatch):
        def inputs_for(*args: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(candidates, "inputs_for", inputs_for)
        with mapping(Work=kernel(2.0)):
            assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
        assert "not measured: out of memory" in last_report().decisions[0].detail

    def test_a_kernel_that_fails_on_inputs_that_are_made_up(self):
        class Picky(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.numpy().any():
                    raise ValueError("only zeros")
                return x + 11

        with mapping(Work=Picky):
            assert torch.equal(run(stack(1.0)[:1]), torch.full((3, 4), 11.0))
        assert "no kernel could be run" in last_report().decisions[0].detail


class TestKept:
    def test_on_disk_and_for_another_process(self, monkeypatch):
        model = stack(1.0)
        with mapping(Work=kernel(2.0)):
            run(model)
            assert disk.entries() == {"choices": 1}
            torch.compiler.reset()  # forgets what this process knows
            found = counted(monkeypatch)
            run(model)
        assert found == []
        assert reasons() == [Reason.SLOWER]
        assert "2e+03 ms" in last_report().decisions[0].detail

    @pytest.mark.parametrize(
        "value", [None, 3, {}, {"how": "magic", "kernel": 0, "why": "", "measured": True},
                  {"how": "op", "kernel": -1, "why": "", "measured": True},
                  {"how": "op", "kernel": True, "why": "", "measured": True},
                  {"how": "op", "kernel": 7, "why": "", "measured": True}]
    )  # fmt: skip
    def test_what_is_not_a_choice_is_found_out_again(self, monkeypatch, value):
        model = stack(1.0)[:1]
        with mapping(Work=kernel(2.0)):
            run(model)
            for path in disk._files("choices"):
                content = json.loads(path.read_text())
                path.write_text(json.dumps({**content, "value": value}))
            torch.compiler.reset()
            found = counted(monkeypatch)
            assert torch.equal(run(model), torch.full((3, 4), 1.0))
        assert found == ["Work"]

    def test_a_damaged_file_is_ignored(self, monkeypatch, caplog):
        model = stack(1.0)[:1]
        monkeypatch.setattr(disk, "_complained", False)
        with mapping(Work=kernel(2.0)):
            run(model)
            for path in disk._files("choices"):
                path.write_text("{")
            torch.compiler.reset()
            with caplog.at_level(logging.WARNING, "kernelgraph"):
                run(model)
        assert "is ignored, and will be written over" in caplog.text
        assert reasons() == [Reason.SLOWER]

    def test_what_a_key_depends_on(self, monkeypatch):
        """Each of these is another kind; the same again is not."""
        found = counted(monkeypatch)
        base = stack(1.0)[:1]
        wide = torch.zeros(3, 8)[:, ::2]
        with mapping(Work=kernel(0.5, plus=0)):
            for model, x, options in [
                (base, torch.zeros(3, 4), {}),
                (base, wide, {}),
                (stack(2.0)[:1], torch.zeros(3, 4), {}),
                (base, torch.zeros(3, 4), {"inner": "aot_eager"}),
                (base.double(), torch.zeros(3, 4, dtype=torch.float64), {}),
            ]:
                run(model, x, **options)
                run(model, x, **options)
            base.float()
            with torch.enable_grad():
                compiled(base)(torch.zeros(3, 4))
        with mapping(Work=kernel(0.5, plus=20)):
            torch.compiler.reset()
            run(base)
        assert len(found) == 7

    def test_another_compiler_is_another_key(self):
        """Also Inductor with other settings, wherever they were made."""
        text = tuning_keys.compiler_text
        kinds = {text(Options()), text(Options(inner="eager")), text(Options(inner=print))}
        kinds |= {text(Options.parse(mode)) for mode in (None, "max-autotune", "default")}
        kinds |= {text(Options(inductor={"max_autotune": True}))}
        kinds |= {text(Options(inner=functools.partial(print, 1)))}
        with torch._inductor.config.patch(max_autotune=True):
            kinds |= {text(Options()), text(Options(inner="eager"))}
        assert len(kinds) == 8

    @pytest.mark.parametrize("of", ["torch", "driver", "triton", "kernelgraph"])
    def test_another_version_is_another_key(self, monkeypatch, of):
        model = stack(1.0)[:1]
        with mapping(Work=kernel(0.5)):
            run(model)
            torch.compiler.reset()
            found = counted(monkeypatch)
            if of == "triton":
                monkeypatch.setattr(keys, "_triton_version", lambda: "99")
            elif of == "driver":
                monkeypatch.setattr(tuning_keys, "driver_version", lambda: "99")
            else:
                monkeypatch.setattr({"torch": torch, "kernelgraph": _version}[of],
                                    "__version__", "99.0")  # fmt: skip
            run(model)
        assert found == (["Work"] if of != "driver" else [])  # the CPU has none


SECONDS = st.sampled_from([0.1, 0.5, 0.97, 1.0, 1.03, 2.0, 9.0])


@settings(max_examples=25)
@given(st.lists(st.tuples(SECONDS, st.booleans()), min_size=1, max_size=5), SECONDS, st.booleans())
def test_each_layer_takes_its_kernel_just_where_that_is_faster(layers, seconds, dynamic):
    """By the times of both, whatever else is in the model, and whatever was chosen before."""
    torch.compiler.reset()
    disk.clear()
    model = nn.Sequential()
    for own, apart in layers:
        model.append(Work(own))
        if apart:
            model.append(nn.Identity())
    used = [seconds < own * (1 - MARGIN) for own, _ in layers]
    with mapping(Work=kernel(seconds)), torch.no_grad():
        compiled_model = torch.compile(
            model, backend="hubkernels", fullgraph=True, dynamic=dynamic, options=FASTEST
        )
        out = compiled_model(torch.zeros(3, 4))
    assert [reason is Reason.KERNEL for reason in reasons()] == used
    assert torch.equal(out, torch.full((3, 4), float(sum(11 if u else 1 for u in used))))


def test_the_default(monkeypatch):
    monkeypatch.delenv("KERNELGRAPH_POLICY")
    model = stack(1.0)[:1]
    with mapping(Work=kernel(2.0)), torch.no_grad():
        out = torch.compile(model, backend="hubkernels", options={"inner": "eager"})(
            torch.zeros(3, 4)
        )
    assert torch.equal(out, torch.full((3, 4), 1.0))


def test_there_is_a_line_of_progress(caplog):
    with mapping(Work=kernel(0.5)), caplog.at_level(logging.INFO, "kernelgraph"):
        run(stack(1.0, 2.0))
    assert "choosing for Work, 1 of 2 kinds of call; 0.0 of 30 s for measuring" in caplog.text
    assert "chosen for Work: op (kernel 500 ms, reference 1e+03 ms)" in caplog.text


def test_random_numbers_are_drawn_as_if_nothing_was_measured():
    model = nn.Sequential(Work(1.0), nn.Dropout(0.5))
    with mapping(Work=kernel(2.0)), torch.no_grad():
        torch.manual_seed(1)
        first = compiled(model)(torch.ones(3, 4))
        torch.manual_seed(1)
        assert torch.equal(first, model(torch.ones(3, 4)))


def test_weights_stay_as_they_are():
    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.kernelgraph_tests_costs.spend(x * self.weight + 11, 0.1)

    model = stack(1.0)[:1]
    before = model[0].weight.detach().clone()
    with mapping(Work=Spoils):
        run(model)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_a_session_is_known_again_by_a_bound_method():
    """Of which Python makes another object each time."""

    class Compiler:
        def compile(self) -> None: ...

    compiler = Compiler()
    session = records.session_of(compiler.compile, 3.0)
    assert records.session_of(compiler.compile, 3.0) is session
    assert records.session_of(Compiler().compile, 3.0) is not session


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("seconds", "reason"), [(0.5, Reason.KERNEL), (2.0, Reason.SLOWER)])
def test_a_graph_that_comes_in_parts(seconds, reason):
    """For a DistributedDataParallel: each kind of call is measured in the part that it is in."""
    size = 600  # a linear layer of that is larger than a bucket of 1 MiB

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Work(1.0, size), Work(3.0, size)
            self.linear = nn.Linear(size, size)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.linear(self.first(x)))

    torch.manual_seed(0)
    model, x = Chain(), torch.randn(3, size)
    expected = model(x)
    with mapping(Work=kernel(seconds, plus=0)):
        parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        parts: list[Any] = []

        def inner(graph_module: Any, inputs: Any) -> Any:
            parts.append(graph_module)
            return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

        out = torch.compile(parallel, backend="hubkernels", options={**FASTEST, "inner": inner})(x)
    torch.testing.assert_close(out, expected)
    assert len(parts) > 2
    assert reasons() == [reason, Reason.KERNEL]
    out.sum().backward()
    assert model.first.weight.grad is not None
