"""Kernels of a decoder's layers, for the CPU, in C++."""

from . import layers
from ._ops import moe_experts, rms_norm, silu_and_mul

__all__ = ["layers", "moe_experts", "rms_norm", "silu_and_mul"]
