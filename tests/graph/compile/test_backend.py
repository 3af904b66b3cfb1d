"""The backend: ``torch.compile(model, backend="hubkernels")``, its graphs, report and errors."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernelgraph
from kernelgraph import Mode, last_report, use_kernel_forward_from_hub, use_kernel_mapping
from kernelgraph.report import Reason
from tests.support.compiled_models import Recorder, assert_same, by_hand, compiled
from tests.support.toy_models import Chain, OpaqueScale, Scale, on_cpu

INNER = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


def test_name_of_the_backend_works_without_an_import() -> None:
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
def test_opaque_kernel_runs_in_a_full_graph(inner: str) -> None:
    model, x = Chain(), torch.randn(3, 4)
    assert_same(compiled(model, inner)(x), by_hand(model, x))


@torch.no_grad()
def test_inner_compiler_may_be_a_callable() -> None:
    recorder, model, x = Recorder(), Chain(), torch.randn(3, 4)
    assert_same(compiled(model, recorder)(x), by_hand(model, x))
    assert len(recorder.ops) == 2
    assert len(set(recorder.ops)) == 1, "one op for all calls of one form"
    (origin,) = {op.rpartition("_")[0] for op in recorder.ops}
    assert origin.startswith("tests_OpaqueScale_")


@torch.no_grad()
def test_report_has_each_decision() -> None:
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
def test_layer_without_a_kernel_leaves_the_graph_unchanged() -> None:
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
def test_other_backend_gets_the_graph_without_kernels() -> None:
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
def test_blocks_of_one_class_share_a_compile() -> None:
    """Nothing that is captured depends on the instance."""
    recorder, blocks = Recorder(), [Scale() for _ in range(4)]
    x = torch.randn(3, 4)
    for i, block in enumerate(blocks):
        block.weight.add_(i)
        block.compile(backend="hubkernels", fullgraph=True, options={"inner": recorder})
    for block in blocks:
        assert_same(block(x), x * block.weight + block.shift + block.eps + 10)
    assert len(recorder.graphs) == 1


@torch.no_grad()
def test_many_classes_compiled_one_by_one_all_compile() -> None:
    """Each class is the root of a graph of its own: they share no limit of recompiles."""
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
def test_dynamic_shapes_compile_once_more_only() -> None:
    recorder, model = Recorder(), Chain()
    f = compiled(model, recorder)
    for length in (3, 5, 6, 7, 1, 9):
        x = torch.randn(length, 4)
        assert_same(f(x), by_hand(model, x))
    # torch.compile always compiles size 1 by itself.
    assert len(recorder.graphs) <= 3


@torch.no_grad()
def test_layers_around_a_graph_break_keep_their_kernels() -> None:
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
def test_inputs_of_any_layout_give_right_results() -> None:
    model = Scale()
    f = compiled(model, "inductor")
    base = torch.randn(4, 6, 4)
    for x in (base.transpose(0, 1), base[::2], base[:, :1].expand(4, 6, 4), base[:0]):
        out = f(x)
        assert_same(out, model(x) + 10)
        assert out.stride() == model(x).stride()


@torch.no_grad()
def test_names_left_in_the_users_module_say_kernelgraph() -> None:
    before = set(sys.modules["tests.support.toy_models"].__dict__)
    compiled(Chain())(torch.randn(3, 4))
    left = set(sys.modules["tests.support.toy_models"].__dict__) - before
    assert all("kernelgraph" in name or name.startswith("__") for name in left), left


# --- errors -------------------------------------------------------------------------------------


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
def test_wrong_option_is_an_error_of_hubkernels(
    model: Any, options: dict[str, Any], message: str
) -> None:
    f = torch.compile(model(), backend="hubkernels", options=options)
    with pytest.raises(Exception, match="hubkernels") as caught:
        f(torch.randn(3, 4))
    assert message in str(caught.value)


@torch.no_grad()
def test_options_and_modes_of_inductor_pass_through() -> None:
    model, x = Chain(), torch.randn(3, 4)
    for kwargs in (
        {"options": {"max-autotune": False}},
        {"mode": "max-autotune-no-cudagraphs"},
    ):
        f = torch.compile(model, backend="hubkernels", fullgraph=True, **kwargs)
        assert_same(f(x), by_hand(model, x))
        torch.compiler.reset()


def test_repository_that_cannot_be_loaded_is_an_error() -> None:
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


def test_impure_hub_layer_is_an_error() -> None:
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


def test_error_of_a_kernel_names_the_kernel_and_the_layer() -> None:
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


def test_every_public_name_exists() -> None:
    assert all(hasattr(kernelgraph, name) for name in kernelgraph.__all__)
