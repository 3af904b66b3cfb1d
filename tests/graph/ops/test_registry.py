"""Which op a call gets: its name, who shares it, and which calls are refused."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import dlpack

from kernelgraph.graph.calls.trees import UnsupportedValue
from kernelgraph.graph.ops import definition
from kernelgraph.graph.ops.registry import lower
from tests.support.op_calls import call_of, kernel_of, layer_of, lowered
from tests.support.op_toys import COMMIT, Native, Plus10, Scale, hub_layer, layer_with

# --- names ----------------------------------------------------------------------------------------


def test_name_says_which_kernel_runs():
    name = lowered(Scale(), kernel_of(Plus10, COMMIT), torch.ones(4)).lowered.name
    assert re.fullmatch(r"toys_Plus10_01234567_[0-9a-f]{8}", name)
    training = lowered(
        Scale(), kernel_of(Plus10, COMMIT), torch.ones(4), training=True
    ).lowered.name
    assert re.fullmatch(r"toys_Plus10_01234567_[0-9a-f]{8}_training", training)


@pytest.mark.parametrize(
    ("repository", "expected"),
    [("my-kernel.v2", "my_kernel_v2"), ("2fast", "k2fast"), ("__x", "x"), ("größe", "gr__e")],
)
def test_name_of_any_repository_is_an_identifier(repository, expected):
    op = lowered(Scale(), kernel_of(Plus10, COMMIT, repository), torch.ones(4))
    assert op.lowered.name.startswith(f"{expected}_Plus10_01234567_")
    assert op()[0].item() == pytest.approx(10.75)


def name_of(module: nn.Module, toy: Any, *args: Any, **kwargs: Any) -> str:
    return lowered(module, toy, *args, **kwargs).lowered.name


def test_equal_calls_share_an_op():
    one = name_of(Scale(), Plus10, torch.ones(4))
    other = Scale(6)
    other.eps = 0.5
    assert name_of(other, Plus10, torch.ones(3, 6)) != one  # another rank
    assert name_of(other, Plus10, torch.ones(6)) == one


def test_name_changes_with_all_that_a_body_depends_on():
    x = torch.ones(4)
    plain = lambda self, x: x + 1  # noqa: E731
    double = Scale(dtype=torch.float64)
    shaped = lambda self, x: torch.empty(x.shape)  # noqa: E731
    names = [
        name_of(Scale(), kernel_of(Plus10, COMMIT), x),
        name_of(Scale(), kernel_of(Plus10, "f" * 40), x),
        name_of(Scale(), kernel_of(Plus10, COMMIT[:8] + "f" * 32), x),
        name_of(Scale(), kernel_of(Native, COMMIT), x),
        name_of(double, kernel_of(Plus10, COMMIT), x.double()),
        name_of(layer_with(plain), kernel_of(hub_layer(plain), COMMIT), x),
        name_of(layer_with(lambda self, x: x + 2), kernel_of(hub_layer(plain), COMMIT), x),
        name_of(layer_with(plain), kernel_of(hub_layer(plain), COMMIT), x=x),
        name_of(layer_with(plain), kernel_of(hub_layer(plain), COMMIT), x, fake=shaped),
    ]
    assert len(set(names)) == len(names)


def register_some() -> list[str]:
    """Register ops of equal schemas, call them, and return their names."""
    x = torch.ones(4)
    made = [
        lowered(Scale(), kernel_of(k, COMMIT), x, training=t)
        for k in (Plus10, Native)
        for t in (False, True)
    ]
    for op in made:
        op()
    return [op.lowered.name for op in made]


def test_another_process_makes_the_same_names_and_exits_cleanly():
    program = "import tests.graph.ops.test_registry as t; print(*t.register_some(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == register_some()


def test_threads_register_an_op_once(monkeypatch):
    defined: list[str] = []
    define = definition._define

    def counted(name, *rest):
        defined.append(name)
        define(name, *rest)

    monkeypatch.setattr(definition, "_define", counted)
    toy = kernel_of(Plus10, "a" * 40)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: lowered(Scale(), toy, torch.ones(4)), range(16)))
    assert defined == [made[0].lowered.name]
    assert {op.lowered.name for op in made} == set(defined)
    assert all(op()[0].item() == pytest.approx(10.75) for op in made)


# --- calls that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x.shape[0], r"returns no tensor"),
        (lambda self, x: None, r"returns no tensor"),
        (lambda self, x: {x}, r"a set is passed or returned"),
        (lambda self, x: setattr(self, "y", x) or x + 1, r"<lambda> sets y of the layer"),
        (lambda self, x: self.listed[0] * x, r"reads self\.listed, a list, which is neither"),
    ],
    ids=["number", "nothing", "set", "sets", "list"],
)
@pytest.mark.parametrize("sees", ["kernel and reference", "reference"])
def test_layer_that_cannot_be_an_op_is_refused(forward, message, sees):
    module = layer_with(forward, weight=nn.Parameter(torch.ones(4)), listed=[iter("")])
    toy = hub_layer(forward) if sees != "reference" else hub_layer(lambda self, x: x.numpy())
    with pytest.raises(UnsupportedValue, match=message):
        lowered(module, toy, torch.ones(4))


def test_sizes_that_depend_on_values_are_refused():
    def positive(self, x):
        return x[x > 0]

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with pytest.raises(UnsupportedValue, match="depends on values of tensors"):
        lowered(layer_with(positive), hub_layer(positive), torch.ones(4), mode=mode)


def test_missing_attribute_is_named_in_the_error():
    class Annotated(nn.Module):
        gamma: Tensor

        def forward(self, x):
            return torch.from_numpy(x.numpy() * self.gamma.numpy())

    def unannotated(self, x):
        return x * self.gamma

    error = r"kernel .*: {} reads self\.gamma, which layer Scale \(Scale\) does not have"
    with pytest.raises(AttributeError, match=error.format("Annotated")):
        lowered(Scale(), Annotated, torch.ones(4))
    op = lowered(Scale(), hub_layer(unannotated), torch.ones(4))
    with pytest.raises(AttributeError, match=error.format("Toy")):
        op()


def test_kernel_that_returns_another_structure_is_an_error():
    op = lowered(Scale(), hub_layer(lambda self, x: (x, None)), torch.ones(4))
    with pytest.raises(
        RuntimeError,
        match=r"Toy returned a tuple of 2 \(a tensor, None\) for layer Scale; expected is a tensor",
    ):
        op()


POINTERS = {
    "data_ptr": lambda x: x.data_ptr(),
    "of a view": lambda x: x.detach()[1:].data_ptr(),
    "of a result": lambda x: (x + 1).data_ptr(),
    "of an allocation": lambda x: torch.empty(4).data_ptr(),
    "data": lambda x: x.data.data_ptr(),
    "parameter": lambda x: nn.Parameter(x).data_ptr(),
    "plain": lambda x: x.as_subclass(torch.Tensor).data_ptr(),
    "storage": lambda x: x.untyped_storage().data_ptr(),
    "resized": lambda x: x.resize_(100).data_ptr(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "dlpack": lambda x: dlpack.to_dlpack(x),
    "from_dlpack": lambda x: np.from_dlpack(x),
    "ctypes": lambda x: ctypes.c_void_p(x.data_ptr()),
    "cuda": lambda x: x.__cuda_array_interface__,
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "buffer": lambda x: memoryview(x),
}


# --- runs on fakes --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("what", POINTERS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fakes_give_no_kernel_their_memory(what, device):
    reached = []

    def native(self, x):
        pointer = POINTERS[what](x.detach())
        reached.append(pointer)  # a native kernel would now write to it
        return x + 10

    mode = FakeTensorMode()
    with mode:
        x = torch.empty(4, device=device)
    module, toy = layer_with(lambda self, x: x + 1), hub_layer(native)
    call, _ = call_of(module, torch.ones(4))
    if device == "meta":  # outside of any mode, as for a model on that device
        x = torch.empty(4, device="meta")
    lower(kernel_of(toy), layer_of(module), call, [x])
    assert reached == []
    if device == "cpu":
        x.data_ptr()  # the tracer's own fakes are as they were
        with mode:
            torch.empty(1).data_ptr()


def test_lowering_an_equal_call_runs_nothing():
    ran = []

    def toy(self, x):
        ran.append(x)
        return x + 10

    cls = hub_layer(toy)
    one = lowered(Scale(), cls, torch.ones(4))
    ran.clear()
    again = lowered(Scale(), cls, torch.ones(4))
    assert again.lowered == one.lowered
    assert ran == []
    other = lowered(Scale(5), cls, torch.ones(5))
    assert other.lowered.name == one.lowered.name
    assert other.lowered.results[0].shape == (5,)
    assert lowered(Scale(), cls, torch.ones(4), training=True).lowered != one.lowered


def test_symbolic_sizes_share_the_op_of_static_ones():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    module, toy = Scale(), kernel_of(Plus10, "c" * 40)
    call, (x, weight, eps) = call_of(module, torch.ones(5, 4))
    fakes = [mode.from_tensor(x), mode.from_tensor(weight, static_shapes=True), eps]
    with mode:
        made = lower(toy, layer_of(module), call, fakes)
    assert made.name == lowered(module, toy, torch.ones(3, 4)).lowered.name
    assert made.results[0].shape[0] == fakes[0].shape[0]
    assert isinstance(made.results[0].shape[0], torch.SymInt)
