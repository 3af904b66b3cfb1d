"""A layer with every kind of state, and the state that a forward reads of it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import linecache
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernelgraph.graph.calls.state import State


def module_level(x: Tensor) -> Tensor:
    return x + 1


class Color(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass
class Config:
    scale: float
    sizes: list[int]
    mask: Tensor

    def total(self) -> float:
        return self.scale * len(self.sizes)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


TANH_GELU = functools.partial(functional.gelu, approximate="tanh")


class Everything(nn.Module):
    scale = 2.0
    classes: Any = (torch.float32, None)
    table = torch.arange(3.0)
    act = staticmethod(module_level)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("running", torch.zeros(2))
        self.plain = torch.full((2,), 3.0)
        self.eps = 1e-5
        self.size = 2
        self.huge = 2**70
        self.flag = True
        self.name = "n"
        self.shape = (2, 3.5, "x")
        self.point = Point(1, 2.0)
        self.dtype = torch.bfloat16
        self.color = Color.RED
        self.function = functional.silu
        self.builtin = torch.relu
        self.partial = TANH_GELU
        self.cls = nn.Linear
        self.inner = Inner()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
        self.config = SimpleNamespace(
            inner=SimpleNamespace(eps=0.5), mask=torch.ones(2), items=[1], get=self.helper
        )
        self.listed = [1, 2]
        self.opaque = iter("")
        self.pair = (torch.ones(2), [torch.zeros(2), 3])

    @property
    def prop(self) -> Tensor:
        return self.weight

    def helper(self, x: Tensor) -> Tensor:
        return x * self.weight

    def hidden(self, x: Tensor) -> Tensor:
        return module_level(self)  # type: ignore[arg-type]

    def twice(self, x: Tensor) -> Tensor:
        return self.helper(self.inner(x)) if len(x) else self.twice(x)

    def counts(self, x: Tensor) -> Tensor:
        self.count = 1
        return x


def source(body: str) -> Callable[..., Any]:
    """A forward with ``body``, whose source Python can find."""
    text = f"def forward(self, x):\n    return {body}\n"
    name = f"<{body}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    exec(compile(text, name, "exec"), {"torch": torch}, found)
    return found["forward"]


def state_of(body: str, module: nn.Module | None = None) -> State:
    return State.of(module if module is not None else Everything(), [source(body)])


def _without_source() -> Callable[..., Any]:
    found: dict[str, Any] = {}
    exec("def without_source(self, x):\n    return self.weight", found)
    return found["without_source"]


without_source = _without_source()
