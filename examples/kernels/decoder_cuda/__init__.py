"""Kernels of a decoder's layers, for NVIDIA GPUs, in Triton."""

from . import layers
from .activation import silu_and_mul
from .moe import moe_experts
from .norm import rms_norm

__all__ = ["layers", "moe_experts", "rms_norm", "silu_and_mul"]
