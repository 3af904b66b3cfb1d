"""A program that runs the Triton kernels on the CPU, on tiny inputs, for test_cuda_layers.py.

TRITON_INTERPRET=1 python -m tests.support.interpreted REPOSITORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import triton

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
from tests.support.sources import import_file

SKIPPED = 77
"""The exit status that stands for a skipped test."""


def check(repository: Path) -> None:
    """Compare all kernels of a repository with float64."""
    package = import_file(repository / "build/torch-cuda/__init__.py", "interpreted_kernels")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, n in ((9, 100), (1, 2), (0, 8)):
            x, weight = norm_inputs(rows, n, dtype=dtype)
            assert_matches(kernel_rms_norm(package), rms_norm, (x, weight))
            assert_matches(kernel_silu_and_mul(package), silu_and_mul, (x,))
        x = torch.randn(64, 6).to(dtype).t()
        assert_matches(kernel_rms_norm(package), rms_norm, (x, torch.randn(64).to(dtype)))
        assert_matches(kernel_silu_and_mul(package), silu_and_mul, (x,))
    # The interpreter cannot multiply bfloat16 matrices.
    for dtype in (torch.float32, torch.float16):
        for shape in ((7, 2, 4, 24, 70), (5, 1, 3, 33, 17), (40, 1, 1, 8, 8), (0, 2, 4, 8, 8)):
            inputs = moe_inputs(*shape, dtype=dtype)
            assert_matches(kernel_moe_experts(package), moe_experts, inputs)
        x, index, *others = moe_inputs(9, 2, 4, 24, 40, dtype=dtype)
        index[::2, 1] = 4
        inputs = tuple(t.mT.contiguous().mT for t in (x, index, *others))
        assert_matches(kernel_moe_experts(package), moe_experts, inputs)
        index.fill_(4)
        assert kernel_moe_experts(package)(x, index, *others).count_nonzero() == 0


if __name__ == "__main__":
    numpy_version = tuple(map(int, np.__version__.split(".")[:2]))
    if numpy_version >= (2, 4) and triton.__version__ < "3.7":
        print(f"the interpreter of triton {triton.__version__} needs numpy < 2.4")
        sys.exit(SKIPPED)
    check(Path(sys.argv[1]))
