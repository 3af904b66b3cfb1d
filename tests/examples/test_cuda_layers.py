"""The Triton kernels against float64, forward and backward: on a GPU, and interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernelgraph import get_local_kernel
from tests.support.reference import (
    assert_matches,
    kernel_moe_experts,
    kernel_rms_norm,
    kernel_silu_and_mul,
    moe_experts,
    moe_inputs,
    norm_inputs,
    rms_norm,
    silu_and_mul,
)
from tests.support.sources import import_example

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


def on_gpu(test):
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.cuda(no_gpu(needs_triton(test)))


@pytest.fixture(scope="module")
def triton_repository() -> Path:
    """The kernel repository with its Triton build alone, which needs no C++ compiler."""
    root: Path = import_example("kernels/build").build(backends=["cuda"])
    return root


@pytest.fixture(scope="module")
def cuda(triton_repository: Path) -> ModuleType:
    return get_local_kernel(triton_repository, backend="cuda")


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@on_gpu
@dtypes
@pytest.mark.parametrize(
    ("rows", "n"), [(1, 1), (3, 64), (1000, 257), (128, 1024), (33, 5000), (17, 8192), (2, 20000)]
)
def test_rms_norm_matches_float64(cuda: ModuleType, rows: int, n: int, dtype: torch.dtype) -> None:
    inputs = norm_inputs(rows, n, dtype=dtype, device="cuda")
    assert_matches(kernel_rms_norm(cuda), rms_norm, inputs)


@on_gpu
@dtypes
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 64), (1000, 257), (70000, 8), (33, 5632)])
def test_silu_and_mul_matches_float64(
    cuda: ModuleType, rows: int, d: int, dtype: torch.dtype
) -> None:
    assert_matches(kernel_silu_and_mul(cuda), silu_and_mul, (3 * randn(rows, 2 * d, dtype=dtype),))


@on_gpu
@dtypes
@pytest.mark.parametrize("shape", [(64,), (2, 3, 50), (2, 0, 8)])
def test_inputs_may_have_any_number_of_dimensions(
    cuda: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = randn(*shape, dtype=dtype)
    assert_matches(kernel_rms_norm(cuda), rms_norm, (x, randn(shape[-1], dtype=dtype)))
    assert_matches(kernel_silu_and_mul(cuda), silu_and_mul, (x,))


@on_gpu
@dtypes
def test_inputs_need_not_be_contiguous(cuda: ModuleType, dtype: torch.dtype) -> None:
    x = randn(60, 7, dtype=dtype).t()
    weight = randn(120, dtype=dtype)[::2]
    assert_matches(kernel_rms_norm(cuda), rms_norm, (x, weight))
    assert_matches(kernel_silu_and_mul(cuda), silu_and_mul, (x,))


@on_gpu
@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 8, 64, 48),
        (7, 2, 4, 24, 40),
        (50, 3, 5, 33, 17),
        (300, 2, 4, 200, 136),
        (1000, 2, 2, 128, 256),
        (3, 1, 64, 16, 16),
        (64, 8, 60, 96, 80),
        (0, 2, 4, 16, 8),
        (5, 0, 4, 16, 8),
    ],
    ids=str,
)
def test_moe_experts_match_float64(
    cuda: ModuleType, shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = moe_inputs(*shape, dtype=dtype, device="cuda")
    assert_matches(kernel_moe_experts(cuda), moe_experts, inputs)


@on_gpu
@dtypes
@pytest.mark.parametrize("tokens", [3, 200])
def test_moe_experts_match_where_one_expert_gets_all_tokens(
    cuda: ModuleType, tokens: int, dtype: torch.dtype
) -> None:
    x, index, *others = moe_inputs(tokens, 2, 4, 48, 40, dtype=dtype, device="cuda")
    inputs = (x, torch.full_like(index, 2), *others)
    assert_matches(kernel_moe_experts(cuda), moe_experts, inputs)


@on_gpu
@dtypes
def test_moe_experts_ignore_the_sentinel_index(cuda: ModuleType, dtype: torch.dtype) -> None:
    x, index, *others = moe_inputs(150, 2, 4, 48, 40, dtype=dtype, device="cuda")
    index[::3, 1] = 4
    index[5] = 4
    assert_matches(kernel_moe_experts(cuda), moe_experts, (x, index, *others))
    index.fill_(4)
    out = kernel_moe_experts(cuda)(x, index, *others)
    assert torch.equal(out, torch.zeros_like(x))


@on_gpu
@dtypes
def test_inputs_of_moe_experts_need_not_be_contiguous(cuda: ModuleType, dtype: torch.dtype) -> None:
    inputs = moe_inputs(150, 2, 4, 48, 40, dtype=dtype, device="cuda")
    transposed = tuple(t.mT.contiguous().mT for t in inputs)
    assert not any(t.is_contiguous() for t in transposed)
    assert_matches(kernel_moe_experts(cuda), moe_experts, transposed)


@on_gpu
def test_moe_experts_do_not_wait_for_the_gpu(cuda: ModuleType) -> None:
    x, index, *others = moe_inputs(40, 2, 8, 64, 96, dtype=torch.bfloat16, device="cuda")
    run = kernel_moe_experts(cuda)
    run(x, index, *others)  # Triton compiles at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, index, *others)
    fresh_x, fresh_index, *_ = moe_inputs(40, 2, 8, 64, 96, dtype=torch.bfloat16, device="cuda")
    x.copy_(fresh_x)
    index.copy_(fresh_index)
    graph.replay()
    assert torch.equal(out, run(x, index, *others))


@on_gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_silu_and_mul_compiles_in_one_graph(cuda: ModuleType, backend: str) -> None:
    compiled = torch.compile(cuda.layers.SiluAndMul(), fullgraph=True, backend=backend)
    inputs = (randn(5, 34, dtype=torch.float32),)
    assert_matches(lambda x: compiled(x), silu_and_mul, inputs)


@on_gpu
def test_wrong_arguments_are_refused(cuda: ModuleType) -> None:
    x, index, weights, gate_up, down = moe_inputs(4, 2, 3, 8, 6, dtype=torch.float32, device="cuda")
    run = kernel_moe_experts(cuda)
    with pytest.raises(ValueError, match=r"down_proj \[E, H, I\], not \[\[4, 8\], "):
        run(x, index, weights, gate_up, down[1:])
    with pytest.raises(ValueError, match=r"must have one dtype of float32, bfloat16 and float16"):
        run(x.double(), index, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"top_k_index must be int64"):
        run(x, index.int(), weights, gate_up, down)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[7\], but hidden_states"):
        kernel_rms_norm(cuda)(x, torch.ones(7, device="cuda"))
    with pytest.raises(ValueError, match=r"the last dimension must be even"):
        kernel_silu_and_mul(cuda)(x[:, 1:])


@needs_triton
def test_kernels_match_float64_in_the_interpreter(triton_repository: Path) -> None:
    """Triton chooses its interpreter when it is imported: in a process of its own, here."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted", str(triton_repository)],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
