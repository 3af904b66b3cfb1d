"""The operands of the runs of a trial: their sizes and indices, and the random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.trials import (
    Norm,
    X,
    composite,
    verdict,
)

Layout = tuple[tuple[int, ...], tuple[int, ...]]


def spying(seen: set[Layout]) -> Callable[..., Any]:
    """Return a forward that notes the sizes and strides of its input."""

    def forward(self, x):
        seen.add((tuple(x.shape), x.stride()))
        return composite(self, x)

    return forward


def test_trial_runs_at_small_sizes():
    seen: set[Layout] = set()
    verdict(Norm(), spying(seen), torch.randn(4096, 1, 16))
    assert seen == {((12, 1, 16), (16, 16, 1))}


def test_trial_runs_at_the_calls_sizes_where_the_layer_needs_them():
    class Blocks(Norm):
        def forward(self, x):
            return super().forward(x.view(64, 16, 16)).view(1024, 16)

    seen: set[Layout] = set()
    assert verdict(Blocks(), spying(seen), torch.randn(1024, 16)).own is not None
    assert seen == {((1024, 16), (16, 1))}


def test_trial_runs_at_the_calls_sizes_where_the_kernel_needs_them():
    seen: set[Layout] = set()

    def forward(self, x):
        assert x.shape[0] % 128 == 0
        return spying(seen)(self, x)

    assert verdict(Norm(), forward, torch.randn(256, 16)).own is not None
    assert seen == {((256, 16), (16, 1))}


def test_random_numbers_go_on_as_before():
    state = torch.get_rng_state()
    verdict(Norm(), lambda self, x: composite(self, x) + 0 * torch.rand(()), X)
    assert torch.equal(torch.get_rng_state(), state)


class Experts(nn.Module):
    """Experts as transformers has them: the reference loops over the data."""

    def __init__(self, how: str = "one_hot") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16, 16) / 4)
        self.how = how

    def forward(self, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = functional.one_hot(index, 6).bool() if self.how == "one_hot" else None
        for expert in range(6):
            mask = index == expert if chosen is None else chosen[..., expert]
            token, slot = torch.where(mask)
            out = out.index_add(0, token, x[token] @ self.weight[expert] * scale[token, slot, None])
        return out


def every_expert(self, x: Tensor, index: Tensor, scale: Tensor, wrong: float = 1.0) -> Tensor:
    dense = torch.einsum("ti,eij->tej", x, self.weight)
    # An index out of range would be the end of a process with a GPU.
    assert index.min() >= 0
    assert index.max() < 6
    dense = torch.cat([dense[:, :1], dense[:, 1:2] * wrong, dense[:, 2:]], 1)
    return (dense.gather(1, index[..., None].expand(-1, -1, 16)) * scale[..., None]).sum(1)


@pytest.mark.parametrize("how", ["one_hot", "mask"])
def test_wrong_gradient_of_one_expert_is_refused(how):
    args = torch.randn(40, 16), torch.zeros(40, 2, dtype=torch.int64), torch.rand(40, 2)
    assert verdict(Experts(how), every_expert, *args).own is not None

    def lies(self, x, index, scale):
        right, wrong = every_expert(self, x, index, scale), every_expert(self, x, index, scale, 2.0)
        return right.detach() + wrong - wrong.detach()

    found = verdict(Experts(how), lies, *args)
    assert "the gradient of weight is off by" in found.wrong


def test_indices_of_unknown_range_are_zeros():
    class Positions(nn.Module):
        def forward(self, x, position):
            return x * position[..., None].cos()

    seen: list[Tensor] = []

    def forward(self, x, position):
        seen.append(position)
        return x * position[..., None].cos()

    args = torch.randn(40, 7, 16), torch.arange(280).view(40, 7)
    assert verdict(Positions(), forward, *args).own is not None
    assert not any(position.any() for position in seen)


@pytest.mark.cuda
def test_random_numbers_of_a_gpu_go_on_as_before():
    class Noise(nn.Module):
        def forward(self, x):
            return x * torch.rand_like(x)

    state = torch.cuda.get_rng_state()
    assert verdict(Noise(), lambda self, x: torch.rand_like(x) * x, X.cuda()).own is not None
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["one_hot", "mask"])
def test_indices_are_in_range_on_a_gpu(how):
    args = torch.randn(40, 16), torch.zeros(40, 2, dtype=torch.int64), torch.rand(40, 2)
    args = tuple(a.cuda() for a in args)
    assert verdict(Experts(how).cuda(), every_expert, *args).own is not None
