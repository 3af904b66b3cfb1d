"""The C++ kernels against float64, forward and backward."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.reference import (
    EPS,
    assert_matches,
    call,
    kernel_moe_experts,
    kernel_rms_norm,
    kernel_silu_and_mul,
    moe_experts,
    moe_inputs,
    norm_inputs,
    rms_norm,
    silu_and_mul,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
some_dtype = st.sampled_from(DTYPES)
# Around the widths of the SIMD registers, and long enough to be shared among threads.
some_width = st.integers(1, 70) | st.sampled_from([1023, 4096])


@settings(max_examples=60)
@given(rows=st.integers(0, 40), n=some_width, dtype=some_dtype)
def test_rms_norm_matches_float64(cpu: ModuleType, rows: int, n: int, dtype: torch.dtype) -> None:
    inputs = norm_inputs(rows, n, dtype=dtype)
    assert_matches(kernel_rms_norm(cpu), rms_norm, inputs)


@settings(max_examples=60)
@given(rows=st.integers(0, 40), d=some_width, dtype=some_dtype)
def test_silu_and_mul_matches_float64(
    cpu: ModuleType, rows: int, d: int, dtype: torch.dtype
) -> None:
    inputs = (3 * torch.randn(rows, 2 * d).to(dtype),)
    assert_matches(kernel_silu_and_mul(cpu), silu_and_mul, inputs)


@dtypes
@pytest.mark.parametrize("shape", [(64,), (2, 3, 50), (2, 0, 8)])
def test_inputs_may_have_any_number_of_dimensions(
    cpu: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    assert_matches(kernel_rms_norm(cpu), rms_norm, (x, torch.randn(shape[-1]).to(dtype)))
    assert_matches(kernel_silu_and_mul(cpu), silu_and_mul, (x,))


@dtypes
def test_inputs_need_not_be_contiguous(cpu: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(60, 7).to(dtype).t()
    weight = torch.randn(120).to(dtype)[::2]
    assert_matches(kernel_rms_norm(cpu), rms_norm, (x, weight))
    assert_matches(kernel_silu_and_mul(cpu), silu_and_mul, (x,))


def test_rms_norm_rounds_as_llama_does(cpu: ModuleType) -> None:
    x, weight = torch.randn(32, 100).bfloat16(), torch.randn(100).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    expected = weight * normed.bfloat16()
    found = kernel_rms_norm(cpu)(x, weight)
    # The sums are made in another order: that may move a rare value across a rounding boundary.
    assert (found != expected).float().mean() < 0.01


def test_silu_and_mul_of_large_values_is_finite(cpu: ModuleType) -> None:
    gate = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    x = torch.cat([gate, torch.ones_like(gate)])
    assert_matches(kernel_silu_and_mul(cpu), silu_and_mul, (x,))


# tokens, top_k, experts, hidden, intermediate: experts with few rows, with many, with both, more
# experts than tokens, one expert, no tokens, no choices.
MOE_SHAPES = [
    (1, 2, 8, 64, 48),
    (7, 2, 4, 24, 40),
    (50, 3, 5, 33, 17),
    (120, 2, 4, 32, 64),
    (3, 1, 64, 16, 16),
    (40, 1, 1, 8, 24),
    (0, 2, 4, 16, 8),
    (5, 0, 4, 16, 8),
]


@dtypes
@pytest.mark.parametrize("shape", MOE_SHAPES, ids=str)
def test_moe_experts_match_float64(
    cpu: ModuleType, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    assert_matches(kernel_moe_experts(cpu), moe_experts, moe_inputs(*shape, dtype=dtype))


@dtypes
@pytest.mark.parametrize("tokens", [3, 40])
def test_moe_experts_match_where_one_expert_gets_all_tokens(
    cpu: ModuleType, tokens: int, dtype: torch.dtype
) -> None:
    x, index, *others = moe_inputs(tokens, 2, 4, 24, 20, dtype=dtype)
    inputs = (x, torch.full_like(index, 2), *others)
    assert_matches(kernel_moe_experts(cpu), moe_experts, inputs)


@dtypes
def test_moe_experts_ignore_the_sentinel_index(cpu: ModuleType, dtype: torch.dtype) -> None:
    x, index, *others = moe_inputs(30, 2, 4, 24, 20, dtype=dtype)
    index[::3, 1] = 4
    index[5] = 4
    assert_matches(kernel_moe_experts(cpu), moe_experts, (x, index, *others))
    index.fill_(4)
    out = kernel_moe_experts(cpu)(x, index, *others)
    assert torch.equal(out, torch.zeros_like(x))


@dtypes
def test_inputs_of_moe_experts_need_not_be_contiguous(cpu: ModuleType, dtype: torch.dtype) -> None:
    x, index, weights, gate_up, down = moe_inputs(30, 2, 4, 24, 20, dtype=dtype)
    inputs = (
        x.t().contiguous().t(),
        index.t().contiguous().t(),
        weights.t().contiguous().t(),
        gate_up.mT.contiguous().mT,
        down.mT.contiguous().mT,
    )
    assert_matches(kernel_moe_experts(cpu), moe_experts, inputs)


def test_moe_experts_take_float32_weights_of_tokens(cpu: ModuleType) -> None:
    x, index, weights, gate_up, down = moe_inputs(9, 2, 4, 24, 20, dtype=torch.bfloat16)
    run = kernel_moe_experts(cpu)
    expected = run(x, index, weights, gate_up, down)
    scale = weights.float().requires_grad_()
    out = run(x, index, scale, gate_up, down)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), scale)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moe_experts_multiply_in_their_own_dtype_where_that_is_fast(
    cpu: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu._ops, "_native_gemm", lambda dtype: True)
    inputs = moe_inputs(60, 2, 4, 24, 20, dtype=dtype)
    assert_matches(kernel_moe_experts(cpu), moe_experts, inputs)


def test_results_do_not_depend_on_the_threads(cpu: ModuleType) -> None:
    x, weight = torch.randn(500, 300), torch.randn(300)
    moe = moe_inputs(40, 2, 8, 64, 96, dtype=torch.float32)
    runs = ((kernel_rms_norm(cpu), (x, weight)), (kernel_moe_experts(cpu), moe))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append([_with_gradients(run, inputs) for run, inputs in runs])
    finally:
        torch.set_num_threads(threads)
    rms_norm_pair, moe_pair = zip(*results, strict=True)
    assert all(map(torch.equal, *rms_norm_pair))
    torch.testing.assert_close(*moe_pair)  # the BLAS may sum otherwise


def _with_gradients(run, inputs):
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = run(*inputs)
    return [out, *torch.autograd.grad(out.sum(), [t for t in inputs if t.requires_grad])]


def test_second_derivatives_are_refused(cpu: ModuleType) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    out = kernel_rms_norm(cpu)(x, torch.ones(8))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_silu_and_mul_compiles_in_one_graph(cpu: ModuleType, dynamic: bool) -> None:
    layer = cpu.layers.SiluAndMul()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6):
        assert_matches(lambda x: compiled(x), silu_and_mul, (torch.randn(rows, 34),))


def test_silu_and_mul_ops_pass_opcheck(cpu: ModuleType) -> None:
    ops = getattr(torch.ops, cpu._ops.NAMESPACE)
    x = torch.randn(4, 3, 20).transpose(0, 1).requires_grad_()
    torch.library.opcheck(ops.silu_and_mul.default, (x,))
    grad = torch.randn(3, 4, 10)
    torch.library.opcheck(ops.silu_and_mul_backward.default, (grad, x.detach()))


def test_only_silu_and_mul_declares_that_it_can_be_compiled(cpu: ModuleType) -> None:
    layers = cpu.layers
    assert layers.SiluAndMul.can_torch_compile
    assert not hasattr(layers.RMSNorm, "can_torch_compile")
    assert not hasattr(layers.MoEExperts, "can_torch_compile")


def _moe_with(**changes):
    names = ("x", "index", "weights", "gate_up", "down")
    inputs = dict(zip(names, moe_inputs(4, 2, 3, 8, 6, dtype=torch.float32), strict=True))
    inputs.update({name: change(inputs[name]) for name, change in changes.items()})
    return tuple(inputs.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda t: t[None]}, "hidden_states must be [tokens, hidden]"),
        ({"index": lambda t: t[1:]}, "top_k_index must be [tokens, k] with 4 tokens"),
        ({"index": lambda t: t.int()}, "top_k_index must be int64, not Int"),
        ({"index": lambda t: t + 4}, "but there are 3 experts (3 itself means: none)"),
        ({"weights": lambda t: t[:, :1]}, "top_k_weights must be floating point of top_k_index's"),
        ({"gate_up": lambda t: t[..., 1:]}, "gate_up_proj must be [experts, 2 * intermediate, 8]"),
        ({"down": lambda t: t[1:]}, "down_proj must be [3, 8, 6], not [2, 8, 6]"),
        (
            {"down": lambda t: t.double()},
            "down_proj is Double; both must have hidden_states' dtype",
        ),
        (
            dict.fromkeys(("x", "gate_up", "down"), lambda t: t.int()),
            "dtype Int is not supported, only float32, float64, bfloat16 and float16 are",
        ),
    ],
)
def test_moe_experts_refuse_wrong_arguments(cpu: ModuleType, changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        kernel_moe_experts(cpu)(*_moe_with(**changes))


@pytest.mark.parametrize(
    ("name", "x", "state", "message"),
    [
        ("RMSNorm", torch.ones(2, 8), {"weight": torch.ones(7)}, "weight has shape [7] but"),
        ("RMSNorm", torch.ones(2, 8), {"weight": torch.ones(8).half()}, "the same dtype"),
        ("RMSNorm", torch.ones(()), {"weight": torch.ones(1)}, "at least one dimension"),
        ("SiluAndMul", torch.ones(2, 7), {}, "the last dimension must be even"),
        ("SiluAndMul", torch.ones(2, 8).int(), {}, "dtype Int is not supported"),
    ],
)
def test_pointwise_layers_refuse_wrong_arguments(
    cpu: ModuleType, name: str, x, state, message: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(cpu, name, x, variance_epsilon=EPS, **state)
