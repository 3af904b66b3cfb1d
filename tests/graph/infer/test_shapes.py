"""Where the shapes of an op's results come from, and what says so when they come from nowhere."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from kernelgraph import last_report, replace_kernel_forward_from_hub, use_kernel_mapping
from kernelgraph.graph.calls.trees import UnsupportedValue
from kernelgraph.graph.infer.output_specs import UnknownShape
from kernelgraph.graph.infer.shapes import infer_output
from kernelgraph.report import Reason
from tests.support.op_calls import call_of, kernel_of, layer_of, lowered
from tests.support.toy_models import on_cpu

INNER = ["eager", "aot_eager", "inductor"]


def kernel(forward: Any) -> type[nn.Module]:
    return type("Toy", (nn.Module,), {"forward": forward, "__module__": __name__})


def layer(forward: Any, fake: Any = None) -> nn.Module:
    """A layer called Layer whose reference is ``forward``."""
    cls = type("Layer", (nn.Module,), {"forward": forward, "__module__": __name__})
    replace_kernel_forward_from_hub(cls, "Layer", fake=fake)
    return cls()


def compiled(
    module: nn.Module, toy: Any, inner: str = "eager", **kwargs: Any
) -> Callable[..., Any]:
    """``module`` compiled with kernel ``toy``."""
    kwargs = {"fullgraph": True, **kwargs}
    f = torch.compile(module, backend="hubkernels", options={"inner": inner}, **kwargs)

    def run(*args: Any) -> Any:
        with use_kernel_mapping(on_cpu(Layer=kernel(toy)), inherit_mapping=False):
            return f(*args)

    return run


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


# --- the order ----------------------------------------------------------------------------------


def told_by(*works: str, fake: bool = False, raises: str = "") -> list[str]:
    """What runs, in its order, to tell a shape, where only ``works`` run on fakes, and ``raises``
    raises on real tensors too."""
    ran: deque[str] = deque()  # lists that a layer appends to are set back

    def forward(name: str) -> Any:
        def body(self, x):
            ran.append(name if isinstance(x, FakeTensor) else f"{name} for real")
            if isinstance(x, FakeTensor) and name not in works:
                x.numpy()
            if name == raises:
                raise ValueError("never")
            return x + 1

        return body

    told = forward("fake") if fake else None
    module = layer(forward("reference"), told)
    toy = kernel_of(kernel(forward("kernel")))
    call, operands = call_of(module, torch.ones(4), forward=toy.forward)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(v) for v in operands]
    _, result = infer_output(toy, layer_of(module), call, fakes)
    return [*ran, result.source]


def test_infer_output_asks_the_reference_first():
    assert told_by("kernel", "reference") == ["reference", "reference"]
    ran = told_by("kernel")
    real = ["reference for real", "reference for real", "probe of the reference"]
    assert ran == ["reference", *real]


def test_infer_output_asks_the_kernel_only_where_the_reference_raises():
    assert told_by("kernel", raises="reference") == [
        "reference",
        "reference for real",
        "kernel",
        "kernel",
    ]
    ran = told_by(raises="reference")
    real = ["kernel for real", "kernel for real", "probe of the kernel"]
    assert ran == ["reference", "reference for real", "kernel", *real]


def test_infer_output_takes_shapes_from_a_fake_and_the_rest_from_the_reference():
    ran = told_by("fake", "reference", fake=True)
    assert ran == ["fake", "reference", "reference"]
    assert told_by("fake", fake=True) == ["fake", "reference", "fake"]


# --- one error ----------------------------------------------------------------------------------


def branches(self, x):
    return x + 1 if x.sum() > 0 else torch.cat([-x, x])


def refuses(self, x):
    x.numpy()
    raise ValueError("a sum of zero\nand more")


ERROR = (
    r"cannot infer the shape of what kernel tests@[0-9a-f]+: Toy returns for layer Layer: neither "
    r"it nor the layer runs on fake tensors, and probing them fails; pass fake= where the layer is "
    r"made extensible \(the reference: \w+: .*; the reference on sample inputs: .*; the kernel: "
    r"RuntimeError: .*numpy.*; the kernel on sample inputs: ValueError: a sum of zero\)"
)


def test_infer_output_raises_one_error_with_every_reason():
    with pytest.raises(UnknownShape, match=ERROR):
        lowered(layer(branches), kernel(refuses), torch.ones(4))
    fake = lambda self, x: torch.empty_like(x)  # noqa: E731
    native = lambda self, x: torch.from_numpy(x.numpy() + 1)  # noqa: E731
    assert lowered(layer(branches, fake), kernel(native), torch.ones(4))()[0].item() == 2


def test_layer_whose_shape_cannot_be_inferred_keeps_its_reference():
    f = compiled(layer(branches), refuses, fullgraph=False)
    assert f(torch.ones(4)).tolist() == [2, 2, 2, 2]
    report = last_report()
    assert report is not None
    [decision] = report.decisions
    assert decision.reason is Reason.NOT_AN_OP
    assert re.match(ERROR, decision.detail)


def test_fake_that_raises_is_an_error_that_names_the_layer():
    def fake(self, x):
        raise TypeError("no")

    with pytest.raises(RuntimeError, match=r"fake= of layer Layer raised TypeError: no"):
        lowered(layer(branches, fake), kernel(refuses), torch.ones(4))


# --- a probe in a graph -------------------------------------------------------------------------


def loop(self, x):
    return torch.stack([row * int(row.sum().item() > 0) for row in x])


def opaque(self, x):
    return torch.from_numpy(x.numpy() + len(x))


@pytest.mark.parametrize("inner", INNER)
def test_compile_probes_a_kernel_that_runs_on_no_fakes(inner):
    f = compiled(layer(loop), opaque, inner)
    for rows in (3, 5, 7):  # static, then dynamic
        x = torch.randn(rows, 4)
        assert torch.equal(f(x), x + rows)


def test_probe_guards_sizes_that_it_ties():
    def reference(self, x):
        return loop(self, x) * self.weight

    def scales(self, x):
        assert x.shape[1] == len(self.weight)  # beyond which it would read
        return torch.from_numpy(x.numpy() * self.weight.detach().numpy() + len(x))

    module = layer(reference)
    module.weight = nn.Parameter(torch.linspace(1, 2, 16))
    f = compiled(module, scales, dynamic=True)
    for rows in (16, 5, 7, 16, 9):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(f(x), x * module.weight + rows)


def test_op_with_a_probe_passes_opcheck():
    op = lowered(layer(loop), kernel(opaque), torch.randn(6, 4))
    torch.library.opcheck(op.overload, tuple(op.operands))


def test_op_is_probed_inside_another_trace():
    """Its fake is asked by whoever traces, with sizes that were not there when it was made."""
    op = lowered(layer(loop), kernel(opaque), torch.randn(6, 4))
    for how in ("fake", "symbolic"):
        graph = make_fx(lambda x: op.overload(x) + 1, tracing_mode=how)(torch.randn(7, 4))
        x = torch.randn(7, 4)
        assert torch.equal(graph(x), x + 7 + 1)
        (node,) = [n for n in graph.graph.nodes if n.target is op.overload]
        assert len(node.users) == 1


def test_dynamic_number_counts_as_a_size():
    runs = []

    def repeats(self, x, n):
        runs.append(type(x))
        return torch.from_numpy(x.numpy().repeat(n))

    def reference(self, x, n):
        return loop(self, x[:, None])[:, 0].repeat_interleave(n)

    module = layer(reference)

    class Model(nn.Module):
        def forward(self, x, y):
            return module(x, y.shape[0] * 2)

    f = compiled(Model(), repeats, dynamic=True)
    for n in (2, 3, 7):
        x, y = torch.randn(5), torch.ones(n)
        count = len(runs)
        assert f(x, y).shape == (10 * n,)
    assert len(runs) == count + 1, "what was found is used for other sizes"


@pytest.mark.parametrize("dynamic", [False, True])
def test_probe_runs_again_for_other_sizes(dynamic):
    def flattens(self, x):
        return torch.from_numpy(x.numpy().reshape(-1))

    f = compiled(layer(lambda self, x: loop(self, x).view(-1)), flattens, dynamic=dynamic)
    for shape in ((3, 4), (5, 6), (2, 9), (3, 4)):
        x = torch.randn(shape)
        assert torch.equal(f(x), x.view(-1))


# --- sizes that depend on values ----------------------------------------------------------------


def positive(self, x):
    return x[x[:, 0] > 0]


def native_positive(self, x):
    array = x.numpy()
    return torch.from_numpy(array[array[:, 0] > 0])


def fake_positive(self, x):
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), x.shape[1]))


@pytest.mark.parametrize("toy", [positive, native_positive])
def test_data_dependent_size_is_refused_without_a_fake(toy):
    x = torch.randn(6, 4)
    for allowed in (False, True):
        mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=allowed))
        with pytest.raises(UnsupportedValue, match=r"depends on values.*pass fake=.*get_ctx\(\)"):
            lowered(layer(positive), kernel(toy), x, mode=mode)


@pytest.mark.parametrize("toy", [positive, native_positive])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fake_may_return_a_data_dependent_size(toy, inner, dynamic):
    module = nn.Sequential(layer(positive, fake_positive), nn.Linear(4, 4))
    f = compiled(module, toy, inner, dynamic=dynamic)
    for count in (9, 12):
        for x in (torch.randn(count, 4), torch.randn(count, 4), -torch.ones(count, 4)):
            torch.testing.assert_close(f(x), module(x))
    report = last_report()
    assert report is not None
    assert {d.reason for d in report.decisions} == {Reason.KERNEL}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradient_flows_through_a_data_dependent_size(inner):
    def weighted(self, x):
        return positive(self, x) * self.weight

    def fake(self, x):
        return fake_positive(self, x)

    with torch.enable_grad():
        module = layer(weighted, fake)
        module.weight = nn.Parameter(torch.linspace(1, 2, 4))
        x = torch.randn(8, 4, requires_grad=True)
        f = compiled(module, lambda self, x: native_positive(self, x.detach()), inner)
        f(x).sum().backward()
        expected = torch.autograd.grad(module(x).sum(), (x, module.weight))
    torch.testing.assert_close((x.grad, module.weight.grad), expected)


@pytest.mark.parametrize("native", [False, True])
def test_operand_may_have_a_data_dependent_size(native):
    """The result of one such layer is the argument of the next, which is probed."""
    first = layer(positive, fake_positive)
    second = type("Second", (nn.Module,), {"forward": loop, "__module__": __name__})
    replace_kernel_forward_from_hub(second, "Second")
    mapping = on_cpu(Layer=kernel(native_positive), Second=kernel(opaque if native else loop))
    module = nn.Sequential(first, second())
    f = torch.compile(module, backend="hubkernels", fullgraph=True, options={"inner": "aot_eager"})
    x = torch.randn(9, 4)
    with use_kernel_mapping(mapping, inherit_mapping=False):
        expected = opaque(None, positive(None, x)) if native else loop(None, positive(None, x))
        assert torch.equal(f(x), expected)


def test_two_calls_have_separate_data_dependent_sizes():
    one = layer(positive, fake_positive)
    module = nn.Sequential(one)

    def twice(x, y):
        return module(x).sum(), module(y), module(x)

    f = compiled(twice, native_positive)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    torch.testing.assert_close(f(x, y), twice(x, y))


def test_each_op_call_has_its_own_data_dependent_size():
    mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=False))
    op = lowered(
        layer(positive, fake_positive), kernel(native_positive), torch.randn(6, 4), mode=mode
    )
    env = mode.shape_env
    assert env is not None
    assert not env.pending_fresh_unbacked_symbols, "telling leaves nothing to bind"
    with mode:
        (x,) = (mode.from_tensor(o) for o in op.operands)
        symbols = [free_unbacked_symbols(op.overload(x)) for _ in range(2)]
    assert [len(s) for s in symbols] == [1, 1]
    assert symbols[0] != symbols[1]
    assert set(env.pending_fresh_unbacked_symbols) == symbols[0] | symbols[1]
    assert not env.allow_dynamic_output_shape_ops, "the rest of the graph is as the user set it"


def test_op_checks_only_the_sizes_that_a_fake_states():
    wrong = lambda self, x: positive(self, x).sum(0)  # noqa: E731
    f = compiled(
        layer(positive, fake_positive), lambda self, x: torch.from_numpy(wrong(self, x).numpy())
    )
    with pytest.raises(RuntimeError, match=r"returned a .* of shape \(4,\).*2 dimensions"):
        f(torch.randn(6, 4))


def test_layer_may_use_data_dependent_sizes_inside():
    """Whatever the user set for the rest of the graph."""

    def scatter(self, x):
        out = torch.zeros_like(x)
        index = (x > 0).nonzero()
        out[index[:, 0], index[:, 1]] = 1
        return out

    f = compiled(layer(scatter), lambda self, x: scatter(self, x) + 10, "inductor")
    x = torch.randn(6, 4)
    assert torch.equal(f(x), scatter(None, x) + 10)


# --- what is left behind --------------------------------------------------------------------------


class Counting(nn.Module):
    calls = 0
    sizes: list[int] = []  # noqa: RUF012 (of the class)

    def forward(self, x):
        type(self).calls += 1
        self.sizes.append(len(x))
        return x * 2


def test_counters_of_a_class_count_the_calls_of_the_program_alone():
    replace_kernel_forward_from_hub(Counting, "Counting")
    toy = kernel(lambda self, x: torch.from_numpy(x.numpy() * 2))
    f = torch.compile(Counting(), backend="hubkernels", options={"inner": "eager", "verify": True})
    with use_kernel_mapping(on_cpu(Counting=toy), inherit_mapping=False):
        assert torch.equal(f(torch.ones(3)), 2 * torch.ones(3))
    assert (Counting.calls, Counting.sizes) == (1, [3])
    report = last_report()
    assert report is not None
    assert "it changes Python data of its class or module" in report.decisions[0].detail


SOURCE = """
import functools, torch

table = None
tables = {}

class Workspace:
    buffer = None

@functools.lru_cache
def cached(n):
    return torch.arange(n) * 2

def forward(self, x):
    global table
    n = x.shape[0]
    if table is None:
        table = torch.ones(n)
    if Workspace.buffer is None:
        Workspace.buffer = torch.empty(n)
    if n not in tables:
        tables[n] = torch.arange(n)
    torch.mul(x, table, out=Workspace.buffer)
    return Workspace.buffer + tables[n] + cached(n)
"""


def test_kernel_that_ran_on_fakes_keeps_none_of_them():
    names: dict[str, Any] = {"__name__": "kernel_of_test"}
    exec(SOURCE, names)
    # The reference tells no shape.
    f = compiled(layer(refuses), names["forward"])
    assert f(torch.ones(4)).tolist() == [1, 4, 7, 10]
    for value in (names["table"], names["Workspace"].buffer, *names["tables"].values()):
        assert type(value) is torch.Tensor
    assert type(names["cached"](4)) is torch.Tensor
