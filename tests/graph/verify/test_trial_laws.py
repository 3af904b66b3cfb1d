"""Laws of trials: kernels that compute the layer may train, and those that do not may not."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph.graph.verify.verdict import Verdict
from tests.support.trials import (
    times,
    verdict,
)


class Gate(nn.Module):
    """A layer that broadcasts its operands and a parameter, whose gradients may be sums."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.silu(x) * y * self.scale


def by_other_means(self, x: Tensor, y: Tensor) -> Tensor:
    return (self.scale * y) * (x * torch.sigmoid(x))


@st.composite
def calls(draw, *dtypes):
    """Draw a layer, arguments that broadcast, and the operands whose gradients are wanted."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 9, 40]), min_size=1, max_size=3))
    shapes = [[1 if draw(st.integers(0, 3)) == 0 else n for n in shape] for _ in range(2)]
    shapes[1] = shapes[1][draw(st.integers(0, len(shape) - 1)) :]
    width = draw(st.sampled_from([1, max(s[-1] for s in shapes)]))
    args = []
    for sizes in shapes:
        tensor = torch.randn(sizes).to(dtype)
        layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
        if layout == "transposed":
            tensor = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        elif layout == "sliced":
            tensor = torch.cat([tensor, tensor], -1)[..., : sizes[-1]]
        elif layout == "expanded" and sizes[0] > 1:
            tensor = tensor[:1].expand(sizes)
        args.append(tensor)
    wanted = draw(st.tuples(*[st.booleans()] * 3).filter(any))
    return Gate(width, dtype), args, wanted


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(calls(torch.float64, torch.float32, torch.bfloat16))
def test_kernel_that_computes_the_layer_by_other_means_may_train(call):
    """A kernel that computes what the layer does, by other means, is never refused."""
    module, args, wanted = call
    found = verdict(module, by_other_means, *args, wanted=wanted)
    assert found.own is not None, found
    assert found == Verdict(found.own)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls(torch.float64, torch.float32, torch.bfloat16),
    st.integers(0, 2),
    st.floats(0.06, 3),
    st.sampled_from([-1, 1]),
)
def test_kernel_that_scales_a_gradient_is_refused(call, which, off, sign):
    """A kernel whose gradient of one operand is scaled by s with |s - 1| > 0.05 is refused where
    that gradient is wanted, and not where it is not.

    In bfloat16 this holds if no gradient is a sum: where terms cancel, rounding errors may be as
    large as what is left.
    """
    module, args, wanted = call
    x, y = args
    elements = {t.numel() for t in (x, y, module.scale, module(x, y))}
    assume(x.dtype != torch.bfloat16 or len(elements) == 1)
    factors = [1.0, 1.0, 1.0]
    factors[which] += sign * off

    def forward(self, x, y):
        x, y, scale = (times(t, f) for t, f in zip((x, y, self.scale), factors, strict=True))
        return functional.silu(x) * y * scale

    found = verdict(module, forward, *args, wanted=wanted)
    name = ("x", "y", "scale")[which]
    assert (found.own is None) == wanted[which], found
    assert found.output == ""
    if wanted[which]:
        assert found.wrong.startswith(f"the gradient of {name} ")
