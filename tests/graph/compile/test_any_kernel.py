"""Any kernel runs with ``fullgraph=True``, also where Dynamo could not trace it."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_mapping
from tests.support.compiled_models import check, compiled, kept_reasons
from tests.support.toy_models import on_cpu

try:
    import triton
    from triton import language
except ImportError:
    triton = None


INNER = ["eager", "aot_eager"]


class Affine(nn.Module):
    """Doubles, and adds its weight; the kernels below add 10 to that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.weight


class InNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.add(2 * x.numpy(), self.weight.detach().numpy()) + 10)


class InCtypes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = (2 * x + self.weight).contiguous()
        values = (ctypes.c_float * out.numel()).from_address(out.data_ptr())
        for i in range(out.numel()):
            values[i] += 10.0
        return out


class InThreads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)

        def work(i: int) -> None:
            with torch.no_grad():  # a thread begins with gradients on, and they share `out`
                out[i] = 2 * x[i] + self.weight + 10

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out


class WithLogging(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("a kernel that prints")
        logging.getLogger("toy").warning("a kernel that logs %s", tuple(x.shape))
        return 2 * x + self.weight + 10


class WithItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        most = x.abs().max().item()
        rows = [[2 * v for v in row] for row in x.tolist()]
        return torch.tensor(rows) + self.weight + (10 if most >= 0 else 0)


class DoubleFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class WithAutogradFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return DoubleFunction.apply(x) + self.weight + 10


@torch.compile(backend="eager")
def doubled_and_broken(x: Tensor) -> Tensor:
    x = x * 2
    torch._dynamo.graph_break()
    return x + 10


class WithNestedCompile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled_and_broken(x) + self.weight


class WithState:
    """State of the kernel's module."""

    calls = 0


class WithGlobals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        WithState.calls += 1
        return torch.from_numpy(2 * x.numpy()) + self.weight + 10


class WithContextManagers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noise = torch.rand(4)
        return 2 * x + self.weight + noise + 10


class WithTry(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x.view(-1, 5)
        except RuntimeError:
            return 2 * x + self.weight + 10


KERNELS = [
    InNumpy,
    InCtypes,
    InThreads,
    WithLogging,
    WithItem,
    WithAutogradFunction,
    WithNestedCompile,
    WithGlobals,
    WithContextManagers,
    WithTry,
]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_kernel_runs_in_a_full_graph(kernel: type[nn.Module], inner: str) -> None:
    check(Affine(), kernel, torch.randn(3, 4), inner=inner)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_kernel_trains_in_a_full_graph(kernel: type[nn.Module]) -> None:
    layer, x = Affine(), torch.randn(3, 4, requires_grad=True)
    replace_kernel_forward_from_hub(Affine, "Layer")
    with use_kernel_mapping(on_cpu(Layer=kernel), inherit_mapping=False):
        # For autograd the result of `WithItem` does not depend on its input.
        own = kernel is not WithItem
        compiled(layer, "aot_eager", own_backward=own)(x).sum().backward()
    assert kept_reasons() == [""]
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    assert torch.equal(layer.weight.grad, torch.full((4,), 3.0))


if triton is not None:

    @triton.jit
    def double(x_ptr, out_ptr, n, block: language.constexpr):
        at = language.program_id(0) * block + language.arange(0, block)
        inside = at < n
        language.store(out_ptr + at, 2 * language.load(x_ptr + at, mask=inside), mask=inside)


class InTriton(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        with torch.cuda.device(x.device), torch.cuda.stream(torch.cuda.current_stream()):
            double[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), block=64)
        return out + self.weight + 10


@pytest.mark.cuda
@pytest.mark.parametrize("inner", [*INNER, "inductor"])
@pytest.mark.parametrize("kernel", [InTriton, WithNestedCompile, WithTry])
def test_any_kernel_runs_on_a_device(kernel: type[nn.Module], inner: str) -> None:
    layer, x = Affine().cuda(), torch.randn(3, 4, device="cuda")
    replace_kernel_forward_from_hub(Affine, "Layer")
    mapping = {"Layer": {d: on_cpu(Layer=kernel)["Layer"]["cpu"] for d in ("cpu", "cuda")}}
    with use_kernel_mapping(mapping, inherit_mapping=False), torch.no_grad():
        torch.testing.assert_close(compiled(layer, inner)(x), layer(x) + 10)
    assert kept_reasons() == [""]


# --- kernels that differ in more than their code --------------------------------------------------


class Factor:
    """Multiplies by a factor, in each of the ways in which something can be called."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return x * self.factor

    def method(self, module: Any, x: Tensor) -> Tensor:
        return x * self.factor


def with_closure(value: Any, read: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * read(value)

    return forward


MADE = {
    "a list": lambda n: with_closure([n], lambda v: v[0]),
    "a dict": lambda n: with_closure({"n": n}, lambda v: v["n"]),
    "an object": lambda n: with_closure(Factor(n), lambda v: v.factor),
    "a tensor": lambda n: with_closure(torch.tensor(n), lambda v: v),
    "a large tensor": lambda n: with_closure(torch.full((20_000,), n), lambda v: v[0]),
    "a callable": Factor,
    "a bound method": lambda n: Factor(n).method,
    "a partial": lambda n: functools.partial(Factor.method, Factor(n)),
}


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_kernels_of_one_code_are_told_apart(name: str) -> None:
    replace_kernel_forward_from_hub(Once, "Once")
    for factor in (2, 5, 7):
        torch.compiler.reset()
        kernel = type("Made", (nn.Module,), {"forward": MADE[name](factor)})
        with use_kernel_mapping(on_cpu(Once=kernel), inherit_mapping=False):
            assert compiled(Once())(torch.ones(2)).tolist() == [factor, factor]
            assert kept_reasons() == [""]
