"""``torch.compile(model, backend="hubkernels")``, end to end."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import kernelgraph
from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
    use_kernelized_func,
)
from kernelgraph.report import Reason
from tests.support.toy_models import (
    Chain,
    ForwardOnlyScale,
    OpaqueScale,
    Repository,
    Scale,
    TraceableScale,
    on_cpu,
)

INNER = ["eager", "aot_eager", "inductor"]
COMPILED_INFERENCE = Mode.INFERENCE | Mode.TORCH_COMPILE
COMPILED_TRAINING = Mode.TRAINING | Mode.TORCH_COMPILE


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


class Recorder:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph_module)
        return graph_module.forward

    @property
    def ops(self) -> list[str]:
        """The names of the kernel ops in the graphs."""
        return [
            str(node.target).split(".")[1]
            for graph in self.graphs
            for node in graph.graph.nodes
            if str(node.target).startswith("hubkernels.")
        ]


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    # The toys add 10, which a kernel that is verified before it trains anything may not.
    options = {"inner": inner, "verify_gradients": False, **options}
    return torch.compile(model, backend="hubkernels", fullgraph=True, options=options)


def by_hand(model: Chain, x: Tensor, extra: float = 10) -> Tensor:
    """What a `Chain` gives where its scales run a kernel that adds ``extra``."""
    first, linear, last = model.layers
    return last(linear(first(x) + extra)) + extra


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class TestBackend:
    def test_the_string_works_without_importing_kernelgraph(self) -> None:
        program = (
            "import torch\n"
            "assert 'hubkernels' in torch._dynamo.list_backends()\n"
            "f = torch.compile(torch.sin, backend='hubkernels', options={'inner': 'eager'})\n"
            "print(f(torch.zeros(2)).tolist())\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout == "[0.0, 0.0]\n", done.stderr

    @pytest.mark.parametrize("inner", INNER)
    @torch.no_grad()
    def test_an_opaque_kernel_runs_in_a_full_graph(self, inner: str) -> None:
        model, x = Chain(), torch.randn(3, 4)
        assert_same(compiled(model, inner)(x), by_hand(model, x))

    @torch.no_grad()
    def test_inner_may_be_a_callable(self) -> None:
        recorder, model, x = Recorder(), Chain(), torch.randn(3, 4)
        assert_same(compiled(model, recorder)(x), by_hand(model, x))
        assert len(recorder.ops) == 2
        assert len(set(recorder.ops)) == 1, "one op for all calls of one form"
        (origin,) = {op.rpartition("_")[0] for op in recorder.ops}
        assert origin.startswith("tests_OpaqueScale_")

    @torch.no_grad()
    def test_the_report_tells_each_decision(self) -> None:
        compiled(Chain())(torch.randn(3, 4))
        report = last_report()
        assert report is not None
        assert report.source == "torch.compile"
        assert [(d.path, d.layer, d.reason) for d in report.decisions] == [
            ("layers.0", "Scale", Reason.KERNEL),
            ("layers.2", "Scale", Reason.KERNEL),
        ]
        (op,) = {d.op for d in report.decisions}
        assert op.startswith("hubkernels::tests_OpaqueScale_")
        text = str(report)
        assert "2 of 2 extensible layers use a kernel" in text
        assert op in text

    @torch.no_grad()
    def test_a_layer_without_a_kernel_leaves_the_graph_as_it_was(self) -> None:
        plain, ours, never = Recorder(), Recorder(), Recorder()
        model, x = Chain(), torch.randn(3, 4)
        torch.compile(model, backend=plain, fullgraph=True)(x)
        torch.compiler.reset()
        with use_kernel_mapping({}, inherit_mapping=False):
            compiled(model, ours)(x)
        report = last_report()
        torch.compiler.reset()
        compiled(model, never, policy="never")(x)
        code = [r.graphs[0].code for r in (plain, ours, never)]
        assert code[0] == code[1] == code[2]
        assert report is not None
        assert {d.reason for d in report.decisions} == {Reason.NO_LAYER}
        report = last_report()
        assert report is not None
        assert {d.reason for d in report.decisions} == {Reason.POLICY}

    @torch.no_grad()
    def test_another_backend_compiles_as_if_kernelgraph_were_not_there(self) -> None:
        reference = getattr(Scale.forward, "__wrapped__", Scale.forward)
        plain = Scale()
        plain.forward = functools.partial(reference, plain)
        graphs = []
        for layer in (plain, Scale()):
            model = nn.Sequential(layer)
            recorder = Recorder()
            torch.compile(model, backend=recorder, fullgraph=True)(torch.randn(3, 4))
            graphs.append(recorder.graphs[0].code)
            torch.compiler.reset()
        assert graphs[0] == graphs[1]

    @torch.no_grad()
    def test_blocks_share_one_compile(self) -> None:
        """Nothing that is captured depends on which instance it was captured for."""
        recorder, blocks = Recorder(), [Scale() for _ in range(4)]
        x = torch.randn(3, 4)
        for i, block in enumerate(blocks):
            block.weight.add_(i)
            block.compile(backend="hubkernels", fullgraph=True, options={"inner": recorder})
        for block in blocks:
            assert_same(block(x), x * block.weight + block.shift + block.eps + 10)
        assert len(recorder.graphs) == 1

    @torch.no_grad()
    def test_layers_compiled_one_by_one(self) -> None:
        """Many classes, each the root of a graph of its own, share nothing that could run out."""
        x = torch.randn(3, 4)
        for i in range(12):

            @use_kernel_forward_from_hub("Scale")
            class Another(Scale):
                amount = float(i)

                def forward(self, x: Tensor) -> Tensor:
                    return x * self.weight + self.shift + self.eps + self.amount

            layer = Another(4 + i)
            x = torch.randn(3, 4 + i)
            assert_same(compiled(layer)(x), layer(x) - i + 10)

    @torch.no_grad()
    def test_dynamic_shapes_compile_once_more_and_no_oftener(self) -> None:
        recorder, model = Recorder(), Chain()
        f = compiled(model, recorder)
        for length in (3, 5, 6, 7, 1, 9):
            x = torch.randn(length, 4)
            assert_same(f(x), by_hand(model, x))
        # Size 1 is always a case of its own for torch.compile.
        assert len(recorder.graphs) <= 3

    @torch.no_grad()
    def test_graph_breaks_keep_their_kernels(self) -> None:
        class Broken(Chain):
            def forward(self, x: Tensor) -> Tensor:
                x = self.layers[0](x)
                torch._dynamo.graph_break()
                return self.layers[2](x)

        model, x = Broken(), torch.randn(3, 4)
        f = torch.compile(model, backend="hubkernels", options={"inner": "eager"})
        assert_same(f(x), model.layers[2](model.layers[0](x) + 10) + 10)
        report = last_report()
        assert report is not None
        assert [d.path for d in report.decisions] == ["layers.0", "layers.2"]

    @torch.no_grad()
    def test_inputs_of_any_layout(self) -> None:
        model = Scale()
        f = compiled(model, "inductor")
        base = torch.randn(4, 6, 4)
        for x in (base.transpose(0, 1), base[::2], base[:, :1].expand(4, 6, 4), base[:0]):
            out = f(x)
            assert_same(out, model(x) + 10)
            assert out.is_contiguous()

    @torch.no_grad()
    def test_names_left_in_the_users_module_are_ours(self) -> None:
        before = set(sys.modules["tests.support.toy_models"].__dict__)
        compiled(Chain())(torch.randn(3, 4))
        left = set(sys.modules["tests.support.toy_models"].__dict__) - before
        assert all("kernelgraph" in name or name.startswith("__") for name in left), left


class TestState:
    """A compiled model follows its layers' values as an eager one does."""

    @pytest.mark.parametrize("inner", ["eager", "inductor"])
    @torch.no_grad()
    def test_changed_values(self, inner: str) -> None:
        model, x = Chain(), torch.randn(3, 4)
        f = compiled(model, inner)
        assert_same(f(x), by_hand(model, x))
        layer = model.layers[2]
        for name, value in [
            ("eps", 0.5),
            ("eps", 0.75),
            ("negate", True),
            ("power", "square"),
            ("weight", nn.Parameter(torch.full((4,), 3.0))),
            ("shift", torch.full((4,), -2.0)),
        ]:
            setattr(layer, name, value)
            expected = OpaqueScale.forward(layer, model.layers[1](model.layers[0](x) + 10))
            assert_same(f(x), expected)
        layer.weight.mul_(2)
        layer.shift.add_(1)
        expected = OpaqueScale.forward(layer, model.layers[1](model.layers[0](x) + 10))
        assert_same(f(x), expected)

    @torch.no_grad()
    def test_weights_are_freed_with_the_model(self) -> None:
        import gc
        import weakref

        model = Chain()
        compiled(model)(torch.randn(3, 4))
        weight = weakref.ref(model.layers[0].weight)
        torch.compiler.reset()
        del model
        gc.collect()
        assert weight() is None

    @torch.no_grad()
    def test_a_copy_runs_on_its_own_weights(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        compiled(model)(x)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        twin.layers[0].weight.add_(1)
        assert_same(compiled(twin)(x), by_hand(twin, x))
        assert_same(compiled(model)(x), by_hand(model, x))


class TestTraining:
    @pytest.mark.parametrize("inner", INNER)
    def test_gradients_are_the_references(self, inner: str) -> None:
        model = Chain()
        x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        with torch.no_grad():
            y.copy_(x)
        upstream = torch.randn(3, 4)
        compiled(model, inner)(x).backward(upstream)
        made = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        # The first kernel's 10 changes what the later layers see, but no gradient formula.
        by_hand(model, y).backward(upstream)
        for actual, p in zip(made, model.parameters(), strict=True):
            assert actual is not None
            assert p.grad is not None
            assert_same(actual, p.grad)
        assert x.grad is not None
        assert y.grad is not None
        assert_same(x.grad, y.grad)
        report = last_report()
        assert report is not None
        assert {d.mode for d in report.kernels} == {str(COMPILED_TRAINING)}
        assert all(d.op.endswith("_training") for d in report.kernels)

    def test_the_mode_is_decided_for_each_call(self) -> None:
        """A layer through which no gradient can flow is one for inference, in any graph."""
        model = Chain()
        model.layers[0].requires_grad_(False)
        compiled(model)(torch.randn(3, 4)).sum().backward()
        report = last_report()
        assert report is not None
        assert [d.mode for d in report.kernels] == [str(COMPILED_INFERENCE), str(COMPILED_TRAINING)]

    def test_train_and_inference_of_one_model(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        f = compiled(model, "aot_eager")
        for _ in range(2):
            f(x).sum().backward()
            with torch.no_grad():
                assert_same(f(x), by_hand(model, x))
            with torch.inference_mode():
                assert_same(f(x).clone(), by_hand(model, x))

    def test_a_step_of_an_optimizer(self) -> None:
        torch.manual_seed(0)
        model, x = Chain(), torch.randn(8, 4)
        twin = copy.deepcopy(model)
        f = compiled(model, "aot_eager")
        for net, call in ((model, f), (twin, lambda x: by_hand(twin, x))):
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                call(x).pow(2).mean().backward()
                optimizer.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert_same(a, b)

    def test_a_kernel_without_backward_serves_no_training(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        with use_kernel_mapping(on_cpu(Scale=ForwardOnlyScale)):
            f = compiled(model)
            assert_same(f(x), model(x))
            report = last_report()
            assert report is not None
            assert {d.reason for d in report.decisions} == {Reason.NO_BACKWARD}
            with torch.no_grad():
                assert_same(f(x), by_hand(model, x, 30))

    def test_kernel_mode_overrules(self) -> None:
        """The kernel for inference in a training graph still gets right gradients."""
        mapping = {
            "Scale": {
                "cpu": {
                    COMPILED_INFERENCE: Repository(ForwardOnlyScale),
                    COMPILED_TRAINING: Repository(OpaqueScale),
                }
            }
        }
        model, x = Chain(), torch.randn(3, 4)
        with use_kernel_mapping(mapping):
            assert_same(compiled(model)(x), by_hand(model, x))
            torch.compiler.reset()
            out = compiled(model, kernel_mode=Mode.INFERENCE)(x)
            assert_same(out, by_hand(model, x, 30))
            out.sum().backward()
            grad = model.layers[0].weight.grad
            model.zero_grad(set_to_none=True)
            by_hand(model, x, 30).sum().backward()
            assert_same(grad, model.layers[0].weight.grad)


class TestKernelized:
    """A model that was kernelized with TORCH_COMPILE has its kernels under any backend."""

    @torch.no_grad()
    def test_the_same_nodes_under_any_backend(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        ours, other = Recorder(), Recorder()
        compiled(model, ours)(x)
        expected = by_hand(model, x)
        kernelize(model, mode=COMPILED_INFERENCE)
        assert_same(torch.compile(model, backend=other, fullgraph=True)(x), expected)
        assert other.ops == ours.ops
        assert other.graphs[0].code == ours.graphs[0].code

    @torch.no_grad()
    def test_the_kernel_runs_eagerly_too(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        expected = by_hand(model, x)
        kernelize(model, mode=COMPILED_INFERENCE)
        assert_same(model(x), expected)
        kernelize(model, mode=Mode.INFERENCE)
        assert_same(model(x), expected)

    @torch.no_grad()
    def test_its_kernels_stay_whatever_is_mapped_later(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        expected = by_hand(model, x)
        kernelize(model, mode=COMPILED_INFERENCE)
        with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
            assert_same(compiled(model)(x), expected)

    @torch.no_grad()
    def test_another_backend_reports_nothing(self) -> None:
        layer = Scale()
        kernelize(layer, mode=COMPILED_INFERENCE)
        report = last_report()
        y = torch.compile(layer.to("meta"), backend="eager")(torch.empty(3, 4, device="meta"))
        assert y.is_meta  # the layer's own forward, since no kernel is for such a device
        assert last_report() is report

    def test_gradients_whatever_mode_it_was_kernelized_for(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        by_hand(model, x).sum().backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        kernelize(model, mode=COMPILED_INFERENCE, verify_gradients=False)
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            assert grad is not None
            assert_same(p.grad, grad)


class TestLayers:
    @torch.no_grad()
    def test_functions(self) -> None:
        @use_kernel_forward_from_hub("double")
        def double(x: Tensor) -> Tensor:
            return 2 * x

        class Double(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.from_numpy(2 * x.numpy() + 10)

        @use_kernelized_func(double)
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return double(x) + 1

        x = torch.randn(3)
        with use_kernel_mapping(on_cpu(double=Double)):
            assert_same(compiled(Model())(x), 2 * x + 11)
            assert_same(compiled(lambda x: double(x=x))(x), 2 * x + 10)

    @pytest.mark.parametrize("value", [3, 2.5, True, None, "text", torch.float64, (1, "text")])
    @torch.no_grad()
    def test_constant_arguments(self, value: Any) -> None:
        class Constant(nn.Module):
            def forward(self, x: Tensor, n: Any) -> Tensor:
                return x + 1

        class HubConstant(nn.Module):
            def forward(self, x: Tensor, n: Any) -> Tensor:
                assert n == value
                return torch.from_numpy(x.numpy() + 10)

        replace_kernel_forward_from_hub(Constant, "Constant")
        layer = Constant()
        with use_kernel_mapping(on_cpu(Constant=HubConstant)):
            made = compiled(lambda x: layer(x, value))(torch.ones(3))
            assert made.tolist() == [11] * 3

    @torch.no_grad()
    def test_classes_that_others_tagged_before_and_after(self) -> None:
        class Early(nn.Module):
            kernel_layer_name = "Scale"

            def __init__(self) -> None:
                super().__init__()
                self.weight, self.shift, self.eps = nn.Parameter(torch.ones(4)), torch.ones(4), 0.5

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight + self.shift + self.eps

        x = torch.randn(3, 4)
        early = nn.Sequential(Early())
        with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
            assert_same(compiled(early)(x), early(x) + 20)

        class Late(Early):
            kernel_layer_name = "Scale"

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight + self.shift + self.eps

        late = nn.Sequential(Late())
        with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
            assert_same(compiled(late)(x), late(x) + 20)

    @torch.no_grad()
    def test_subclasses(self) -> None:
        class Inherits(Scale):
            pass

        class Overrides(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        x = torch.randn(3, 4)
        for cls, extra in ((Inherits, 10), (Overrides, 0)):
            model = nn.Sequential(cls())
            assert_same(compiled(model)(x), model(x) + extra)

    @torch.no_grad()
    def test_adopting_a_class_changes_nobody_elses_forward(self) -> None:
        class Plain(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Over(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return -x

        class Named(Plain):
            pass

        class Both(Named, Over):
            pass

        replace_kernel_forward_from_hub(Named, "Scale")
        x = torch.ones(2)
        assert Both()(x).tolist() == [-1, -1]
        compiled(Both())(x)
        assert Both()(x).tolist() == [-1, -1]
        assert Named()(x).tolist() == [1, 1]

    @torch.no_grad()
    def test_conditions_are_asked_of_each_instance(self) -> None:
        @use_kernel_forward_from_hub("Scale", condition=lambda layer: layer.wanted)
        class Picky(Scale):
            wanted = True

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight + self.shift + self.eps

        model, x = nn.Sequential(Picky(), Picky()), torch.randn(3, 4)
        model[1].wanted = False
        assert_same(compiled(model)(x), model[1](model[0](x) + 10))
        report = last_report()
        assert report is not None
        assert [d.reason for d in report.decisions] == [Reason.KERNEL, Reason.CONDITION]

    @torch.no_grad()
    def test_an_instances_own_forward_is_left_alone(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        layer = model.layers[0]
        layer.forward = lambda x: type(layer).forward(layer, x) + 100
        expected = model.layers[2](model.layers[1](layer(x))) + 10
        assert_same(compiled(model)(x), expected)
        report = last_report()
        assert report is not None
        assert [d.reason for d in report.decisions] == [Reason.OWN_FORWARD, Reason.KERNEL]

    @torch.no_grad()
    def test_a_layer_within_a_layer(self) -> None:
        @use_kernel_forward_from_hub("Outer")
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Scale()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) + 1

        class HubOuter(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) + 1000

        model, x = Outer(), torch.randn(3, 4)
        reference = model.inner(x)
        assert_same(compiled(model)(x), reference + 11)
        torch.compiler.reset()
        with use_kernel_mapping(on_cpu(Outer=HubOuter)):
            assert_same(compiled(model)(x), reference + 1000)

    @torch.no_grad()
    def test_no_kernel_for_the_device(self) -> None:
        with use_kernel_mapping({"Scale": {"cuda": Repository(OpaqueScale)}}, False):
            model, x = Chain(), torch.randn(3, 4)
            assert_same(compiled(model)(x), model(x))
        report = last_report()
        assert report is not None
        assert {d.reason for d in report.decisions} == {Reason.NO_DEVICE}
        assert "cuda" in str(report)

    @torch.no_grad()
    def test_disabled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
        model, x = Chain(), torch.randn(3, 4)
        assert_same(compiled(model)(x), model(x))


class TestErrors:
    """What is wrong is said by its own words, under the name of the backend."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"polcy": "always"}, "unknown option polcy"),
            ({"policy": "sometimes"}, "policy is one of fastest, always, never, not 'sometimes'"),
            ({"inner": "indictor"}, "inner is one of inductor, aot_eager, eager or a callable"),
            ({"kernel_mode": "training"}, "kernel_mode is a kernelgraph.Mode, not 'training'"),
            ({"kernel_mode": Mode.FALLBACK}, "FALLBACK"),
            ({"inner": "eager", "max_autotune": True}, "max_autotune: not an option of hubkernels"),
        ],
    )
    @pytest.mark.parametrize("model", [Chain, lambda: nn.Linear(4, 4)])
    def test_options(self, model: Any, options: dict[str, Any], message: str) -> None:
        f = torch.compile(model(), backend="hubkernels", options=options)
        with pytest.raises(Exception, match="hubkernels") as caught:
            f(torch.randn(3, 4))
        assert message in str(caught.value)

    @torch.no_grad()
    def test_inductors_own_options_and_modes_pass_through(self) -> None:
        model, x = Chain(), torch.randn(3, 4)
        for kwargs in (
            {"options": {"max-autotune": False}},
            {"mode": "max-autotune-no-cudagraphs"},
        ):
            f = torch.compile(model, backend="hubkernels", fullgraph=True, **kwargs)
            assert_same(f(x), by_hand(model, x))
            torch.compiler.reset()

    def test_a_repository_that_cannot_be_loaded(self) -> None:
        class Missing:
            def load(self) -> type[nn.Module]:
                raise FileNotFoundError("no variant of org/missing fits")

        model = Chain()
        with use_kernel_mapping({"Scale": {"cpu": Missing()}}):
            f = compiled(model)
            with pytest.raises(Exception, match="no variant of org/missing fits"):
                f(torch.randn(3, 4))
        torch.compiler.reset()
        assert_same(compiled(model)(torch.zeros(1, 4)), by_hand(model, torch.zeros(1, 4)))

    def test_an_impure_hub_layer(self) -> None:
        class Impure(nn.Module):
            def __init__(self) -> None:
                super().__init__()

            def forward(self, x: Tensor) -> Tensor:
                return x

        with (
            use_kernel_mapping(on_cpu(Scale=Impure)),
            pytest.raises(Exception, match="hub layer Impure has an __init__"),
        ):
            compiled(Chain())(torch.randn(3, 4))

    def test_a_kernel_that_raises(self) -> None:
        class Raises(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise ArithmeticError("no kernel image")

        with (
            use_kernel_mapping(on_cpu(Scale=Raises)),
            pytest.raises(
                RuntimeError, match=r"(?s)kernel tests@\w{8}: Raises.*layer Scale.*no kernel image"
            ),
            torch.no_grad(),
        ):
            compiled(Chain())(torch.randn(3, 4))


def test_every_public_name_is_there() -> None:
    assert all(hasattr(kernelgraph, name) for name in kernelgraph.__all__)


def test_a_parameter_may_have_any_name():
    """Also one that the capture has for variables of its own."""

    @use_kernel_forward_from_hub("Named")
    class Named(nn.Module):
        def forward(self, x: Tensor, module: Tensor, read: float = 1.0) -> Tensor:
            return x * module * read

    class Kernel(nn.Module):
        def forward(self, x: Tensor, module: Tensor, read: float = 1.0) -> Tensor:
            return x * module * read + 10

    layer, x = Named(), torch.ones(3)
    assert torch.equal(layer(x, module=2 * x, read=3.0), 6 * x)
    with use_kernel_mapping({"Named": {"cpu": Repository(Kernel)}}), torch.no_grad():
        compiled = torch.compile(
            layer, backend="hubkernels", fullgraph=True, options={"inner": "eager"}
        )
        assert torch.equal(compiled(x, module=2 * x, read=3.0), 16 * x)
