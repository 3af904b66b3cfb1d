"""Call signatures as JSON: a kernel computes the same on the signature that comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from kernelgraph.graph.calls.runner import Runner
from kernelgraph.programs.portable_call import (
    call_from_json,
    call_to_json,
    check_needs_no_code,
)
from kernelgraph.programs.portable_json import NotPortable
from tests.support.op_calls import call_of
from tests.support.toy_models import Scale


class Nested(nn.Linear):
    """A class of the model on a class of torch, with modules and containers in it."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.act = nn.SiLU()
        self.inner = Scale(3)
        self.scales = [1.5, 2.5]
        self.tables = {"a": torch.ones(3)}


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.act(nn.functional.linear(x, self.weight, self.bias))
    return y * self.inner.weight * self.scales[1] + self.tables["a"]


def test_kernel_computes_the_same_on_the_stand_in() -> None:
    """The stand-in has the classes that came back from the JSON."""
    torch.manual_seed(0)
    module, x = Nested(), torch.randn(2, 3)
    call, operands = call_of(module, x, forward=forward)
    data = json.loads(json.dumps(call_to_json(call, [p for p, _ in call.state.constants])))
    made = call_from_json(data)
    assert (made.names, made.types, made.arguments) == (call.names, call.types, call.arguments)
    classes = dict(made.state.nodes)
    assert classes[()] is not Nested
    assert issubclass(classes[()], nn.Linear)  # type: ignore[arg-type]
    assert classes[("act",)] is nn.SiLU
    assert call_from_json(data).state.nodes == made.state.nodes
    torch.testing.assert_close(Runner(forward, made)(operands), forward(module, x))


def _calls_inner(self: Any, x: Any) -> Any:
    return self.inner(x)


def _calls_helper(self: Any, x: Any) -> Any:
    return self.helper(x)


def _calls_forward(self: Any, x: Any) -> Any:
    return self.inner.forward(x)


@pytest.mark.parametrize(
    ("kernel", "uses"),
    [(_calls_inner, "inner"), (_calls_helper, "helper"), (_calls_forward, "inner.forward")],
)
def test_kernel_that_uses_code_of_the_model_is_refused(kernel: Any, uses: str) -> None:
    class Helped(Nested):
        def helper(self, x: Any) -> Any:
            return x

    with pytest.raises(NotPortable, match=rf"the kernel uses self\.{uses}, which is code of"):
        check_needs_no_code(Helped(), kernel)


def test_kernel_may_use_code_of_torch() -> None:
    check_needs_no_code(Nested(), forward)
