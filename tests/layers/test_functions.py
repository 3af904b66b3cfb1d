"""Extensible functions: they behave as functions, and are kernelized through their callers."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from kernelgraph import (
    Mode,
    kernelize,
    last_report,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from tests.support.toys import Plain, only, result


@use_kernel_forward_from_hub("shift")
def shift(x: Tensor, by: int = 1) -> Tensor:
    """Add to ``x``."""
    return x + by


shift.note = "a function may have attributes"


class ShiftKernel(nn.Module):
    def forward(self, x: Tensor, by: int = 1) -> Tensor:
        return x + by + 10


@use_kernelized_func(shift)
class Caller(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return shift(x)


@pytest.fixture
def _shift_restored() -> Any:
    """A function is shared by the whole process."""
    yield
    vars(shift).pop("forward", None)


@pytest.mark.usefixtures("_shift_restored")
class TestFunction:
    def test_still_behaves_as_one(self) -> None:
        assert shift(3) == 4
        assert shift(3, by=2) == 5
        assert (shift.__name__, shift.__qualname__, shift.__module__) == (
            "shift",
            "shift",
            __name__,
        )
        assert shift.__doc__ == "Add to ``x``."
        assert shift.note == "a function may have attributes"
        assert str(inspect.signature(shift)) == "(x: 'Tensor', by: 'int' = 1) -> 'Tensor'"
        with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'x'"):
            shift()

    def test_stays_one_object(self) -> None:
        assert copy.copy(shift) is shift
        assert copy.deepcopy([shift])[0] is shift
        assert pickle.loads(pickle.dumps(shift)) is shift

    def test_is_kernelized_through_its_caller(self) -> None:
        model = nn.Sequential(Caller(), Caller())
        with only(shift=ShiftKernel):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert result(model) == 23
        assert result(shift) == 12
        assert str(inspect.signature(shift)) == "(x: 'Tensor', by: 'int' = 1) -> 'Tensor'"
        assert result(copy.deepcopy(model)) == 23
        assert result(pickle.loads(pickle.dumps(model))) == 23
        assert list(model.state_dict()) == []
        with only():
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert result(model) == 3

    def test_is_decided_once_wherever_it_is_met(self, last_paths: Callable[[], list[str]]) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.caller = Caller()
                self.function = shift  # which makes it a submodule

        with only(shift=ShiftKernel):
            kernelize(Holder(), mode=Mode.INFERENCE, device="cpu")
            assert last_paths() == ["caller.shift"]
            kernelize(nn.Sequential(shift, Caller()), mode=Mode.INFERENCE, device="cpu")
            assert last_paths() == ["0"]
            kernelize(Caller(), mode=Mode.INFERENCE, device="cpu")
            assert last_paths() == ["shift"]

    def test_is_seen_where_the_kernels_package_puts_it(self) -> None:
        caller = Plain()
        caller.__dict__["_kernel_funcs"] = {"shift": shift}
        with only(shift=ShiftKernel):
            kernelize(caller, mode=Mode.INFERENCE, device="cpu")
        assert result(shift) == 12

    def test_of_the_class_is_seen_beside_those_of_the_instance(
        self, last_paths: Callable[[], list[str]]
    ) -> None:
        @use_kernel_forward_from_hub("other")
        def other(x: Tensor) -> Tensor:
            return x

        caller = Caller()
        caller.__dict__["_kernel_funcs"] = {"other": other}
        with only(shift=ShiftKernel):
            kernelize(caller, mode=Mode.INFERENCE, device="cpu")
        assert last_paths() == ["shift", "other"]

    def test_of_a_base_class_is_seen_beside_those_of_a_subclass(
        self, last_paths: Callable[[], list[str]]
    ) -> None:
        @use_kernel_forward_from_hub("other")
        def other(x: Tensor) -> Tensor:
            return x

        @use_kernelized_func(other)
        class Sub(Caller):
            pass

        with only():
            kernelize(Sub(), mode=Mode.INFERENCE, device="cpu")
            assert last_paths() == ["shift", "other"]
            kernelize(Caller(), mode=Mode.INFERENCE, device="cpu")
            assert last_paths() == ["shift"]

    def test_of_the_same_name_does_not_hide_another(
        self, last_paths: Callable[[], list[str]]
    ) -> None:
        def make() -> Any:
            @use_kernel_forward_from_hub("namesake")
            def shift(x: Tensor) -> Tensor:
                return x

            shift.__module__ = "elsewhere"
            return shift

        @use_kernelized_func(shift, make(), shift)
        class Both(nn.Module):
            pass

        with only():
            kernelize(Both(), mode=Mode.INFERENCE, device="cpu")
        assert last_paths() == ["shift", "elsewhere.shift"]

    def test_has_a_condition_as_a_class_has(self) -> None:
        @use_kernel_forward_from_hub("shift", condition=lambda module: False)
        def left_alone(x: Tensor, by: int = 1) -> Tensor:
            return x + by

        with only(shift=ShiftKernel):
            kernelize(nn.Sequential(left_alone), mode=Mode.INFERENCE, device="cpu")
        assert result(left_alone) == 2


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (lambda x, /, y=1: x * 1, "def forward(self, x, /, y=1): return x + 10"),
        (lambda x, *, y=1: x * 1, "def forward(self, x, *, y=1): return x + 10"),
        (lambda *x, **y: x[0] * 1, "def forward(self, *x, **y): return x[0] + 10"),
        (lambda self: self * 1, "def forward(self, x): return x + 10"),
    ],
)
def test_every_kind_of_parameter_is_passed_on(function: Any, kernel: str) -> None:
    layer = use_kernel_forward_from_hub("anything")(function)
    assert result(layer) == 1
    namespace: dict[str, Any] = {}
    exec(kernel, namespace)
    with only(anything=type("Kernel", (nn.Module,), {"forward": namespace["forward"]})):
        kernelize(nn.Sequential(layer), mode=Mode.INFERENCE, device="cpu")
    assert result(layer) == 11


def test_use_kernelized_func_refuses_what_is_not_extensible() -> None:
    def plain(x: Tensor) -> Tensor:
        return x

    with pytest.raises(
        TypeError, match=r"^'plain' is not extensible: decorate it with @use_kernel"
    ):
        use_kernelized_func(plain)
    with pytest.raises(TypeError, match=r"use_kernelized_func decorates an nn.Module class, not <"):
        use_kernelized_func(shift)(int)


@pytest.fixture
def last_paths() -> Callable[[], list[str]]:
    return lambda: [decision.path for decision in last_report().decisions]
