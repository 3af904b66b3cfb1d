"""The options of eager training, and what log and report say of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import Mode, kernelize, last_report
from kernelgraph.report import Reason
from tests.support.toys import BrokenRepository, Plus10, Scale, forwards, only
from tests.support.training_kernels import (
    TRAINING,
    WIDTH,
    Detached,
    Gate,
    Plain,
    gradients,
    inputs,
    kernelized,
)

# --- options -------------------------------------------------------------------------------------


class TestOptions:
    @pytest.mark.parametrize("value", [None, 1, "yes"])
    def test_verify_gradients_is_a_bool(self, value: Any) -> None:
        layer = Gate()
        with pytest.raises(TypeError, match=r"^verify_gradients is True or False, not "):
            kernelized(BrokenRepository(), layer, verify_gradients=value)
        assert forwards(layer) == {}

    @pytest.mark.parametrize("value", [None, True, ["recompute"]])
    def test_wrong_gradient_is_a_str(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r'^wrong_gradient is "recompute" or "reference", not '):
            kernelized(BrokenRepository(), wrong_gradient=value)

    def test_wrong_gradient_is_one_of_two(self) -> None:
        with pytest.raises(
            ValueError, match=r"^wrong_gradient is \"recompute\" or \"reference\", not 'raise'$"
        ):
            kernelized(BrokenRepository(), wrong_gradient="raise")

    @pytest.mark.parametrize("mode", [TRAINING, TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE])
    def test_options_are_kept_in_copies_and_pickles(self, mode: Mode) -> None:
        with only(Scale=Plus10):
            layer = kernelize(
                Scale(), mode=mode, verify_gradients=False, wrong_gradient="reference"
            )
        for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            recipe = vars(one)["forward"].recipe
            assert (recipe.verify_gradients, recipe.wrong_gradient) == (False, "reference")

    def test_options_take_effect_in_copies_and_pickles(self) -> None:
        for options in ({}, {"verify_gradients": False}):
            with only(Scale=Plus10):
                layer = kernelize(Scale(), mode=TRAINING, **options)
            for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert one(torch.ones(())) == (11 if options else 1)


# --- log and report ------------------------------------------------------------------------------


def gates(count: int) -> nn.Sequential:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x, x)

    return nn.Sequential(*(Step() for _ in range(count)))


class TestReport:
    def test_each_kernel_layer_and_reason_is_warned_of_once(
        self, warnings: Callable[[], list[str]]
    ) -> None:
        for _ in range(2):
            model = kernelized(Detached, gates(3))
            for rows in (2, 3, 2):
                model(torch.randn(rows, WIDTH, requires_grad=True)).sum().backward()
        (message,) = warnings()
        kernel = str(last_report().decisions[0].kernel)
        assert message == (
            f"kernel {kernel} for layer Gate at 0.gate: it has no backward: no gradient flows "
            "through what it returns; its backward runs the layer's own forward again, for its "
            "gradient"
        )

    def test_report_says_where_the_gradient_comes_from(self) -> None:
        model = kernelized(Detached, gates(2))
        published = last_report()
        assert [d.gradient for d in published.decisions] == ["", ""]
        x = torch.randn(2, WIDTH, requires_grad=True)
        model[0](x)
        assert [bool(d.gradient) for d in last_report().decisions] == [True, False]
        model(x)
        decisions = last_report().decisions
        assert [d.path for d in decisions] == ["0.gate", "1.gate"]
        for decision in decisions:
            assert decision.reason is Reason.KERNEL
            assert decision.gradient.startswith("reference: it has no backward")
        # A report that was published does not change.
        assert [d.gradient for d in published.decisions] == ["", ""]

    def test_report_says_which_layers_keep_their_reference(self) -> None:
        model = kernelized(Detached, gates(2), wrong_gradient="reference")
        kernel = last_report().decisions[0].kernel
        model(torch.randn(2, WIDTH, requires_grad=True))
        for decision in last_report().decisions:
            assert (decision.reason, decision.kernel) == (Reason.WRONG, "")
            assert decision.detail.startswith(f"{kernel}: it has no backward")

    def test_report_shows_the_worst_of_the_calls(self) -> None:
        class Wide(nn.Module):
            """Has a gradient of inputs with two dimensions only."""

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                made = Plain.forward(self, x, y)
                return made if x.dim() > 1 else made.detach()

        layer = kernelized(Wide)
        for shape, source in [((2, WIDTH), "kernel"), ((WIDTH,), "refer"), ((2, WIDTH), "refer")]:
            gradients(layer, *inputs(*shape))
            assert last_report().decisions[0].gradient.startswith(source)

    def test_report_of_a_later_kernelize_is_left_alone(self) -> None:
        model = kernelized(Detached, gates(1))
        with only(Scale=Plus10):
            kernelize(Scale(), mode=Mode.INFERENCE)
        other = last_report()
        model(torch.randn(2, WIDTH, requires_grad=True))
        assert last_report() is other

    def test_gradients_of_a_copy_are_warned_of_and_not_reported(
        self, warnings: Callable[[], list[str]]
    ) -> None:
        layer = kernelized(Detached)
        report = last_report()
        for one in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            gradients(one, *inputs())
        assert last_report() is report
        assert len(warnings()) == 1
        assert " for layer Gate: it has no backward" in warnings()[0]
