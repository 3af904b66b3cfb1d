"""Layers and kernels that take as long as they say, by a clock that only they move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelgraph import use_kernel_forward_from_hub


class Clock:
    """A clock that counts the seconds that toys spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.backwards = False
        """Whether slow layers are fast and fast ones slow."""

    def spend(self, seconds: float) -> None:
        self.now += 1 / seconds if self.backwards and seconds else seconds

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
_library = torch.library.Library("kernelgraph_tests_costs", "DEF")
_library.define("spend(Tensor x, float seconds) -> Tensor")


def _spend(x: Tensor, seconds: float) -> Tensor:
    CLOCK.spend(seconds)
    return x.clone()


_library.impl("spend", _spend, "CPU")
torch.library.register_fake(
    "kernelgraph_tests_costs::spend", lambda x, seconds: torch.empty_like(x), lib=_library
)


def _save(ctx: object, inputs: object, output: object) -> None:
    pass


torch.library.register_autograd(
    "kernelgraph_tests_costs::spend",
    lambda ctx, grad: (spend(grad, 0.0), None),
    setup_context=_save,
    lib=_library,
)
spend = torch.ops.kernelgraph_tests_costs.spend


@use_kernel_forward_from_hub("Work")
class Work(nn.Module):
    """Adds 1 in ``seconds``."""

    def __init__(self, seconds: float = 1.0, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return spend(x * self.weight + 1, self.seconds)


@use_kernel_forward_from_hub("Odd")
class Odd(nn.Module):
    """As `Work`, but no compiler can trace it."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        y = torch.from_numpy(x.detach().numpy() + 1)
        if float(y.sum()) > 1e9:
            return y
        return spend(y, self.seconds)


@use_kernel_forward_from_hub("Steps")
class Steps(nn.Module):
    """Adds 1, in a time that depends on its arguments."""

    def forward(
        self, x: Tensor, times: int = 1, slow: bool = False, how: str = "", scale: float = 1.0
    ) -> Tensor:
        return spend(x + scale, times + 2 * slow + 2 * bool(how))


class StepsAtOnce(nn.Module):
    """As `Steps` and 10, always in 2 seconds."""

    def forward(
        self, x: Tensor, times: int = 1, slow: bool = False, how: str = "", scale: float = 1.0
    ) -> Tensor:
        return spend(x + (10 + scale), 2.0)


def kernel(seconds: float, plus: float = 10.0, **flags: object) -> type[nn.Module]:
    """A kernel for `Work` and `Odd` that takes ``seconds`` and adds ``plus`` to the result."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        weight = getattr(self, "weight", 1.0)
        return spend(x * weight + (1 + plus), seconds)

    made = type(f"Kernel{int(plus)}", (nn.Module,), {"forward": forward, **flags})
    made.__module__ = __name__
    return made
