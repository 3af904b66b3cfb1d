"""Tuning keys: which calls share a winner."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from kernelgraph import _version, keys
from kernelgraph import cache as disk
from kernelgraph.graph.autotune import tuning_keys
from kernelgraph.graph.lowering.options import Options
from kernelgraph.report import Reason
from tests.support.costs import Steps, StepsAtOnce, kernel
from tests.support.tuned_models import (
    InTurn,
    compiled,
    mapping,
    measured_layers,
    reasons,
    run,
    stack,
)


def test_other_sizes_are_another_key(monkeypatch):
    found = measured_layers(monkeypatch)
    model = stack(1.0)
    with mapping(Work=kernel(0.5)):
        run(model, torch.zeros(3, 4))
        run(model, torch.zeros(5, 4))
        run(model, torch.zeros(3, 4, dtype=torch.float64).float())
    assert found == ["Work", "Work"]


@pytest.mark.parametrize(
    "flags",
    [[{"slow": False}, {"slow": True}], [{"times": 1}, {"times": 3}], [{}, {"how": "slowly"}]],
    ids=["a flag", "a number", "a name"],
)
def test_constants_are_part_of_the_key(flags):
    """The winner may depend on their values."""
    with mapping(Steps=StepsAtOnce):
        assert torch.equal(run(InTurn(*flags).eval()), torch.full((3, 4), 1.0 + 11.0))
    assert reasons() == [Reason.SLOWER, Reason.KERNEL]
    takes = [kept["about"]["takes"] for kept in disk.values(disk.CHOICES)]
    wanted = [[f"{k}={v!r}" for k, v in each.items()] for each in flags]
    assert sorted(takes) == sorted(", ".join(["float32[3x4]", *each]) for each in wanted)


def test_values_of_floats_are_not_part_of_the_key(monkeypatch):
    found = measured_layers(monkeypatch)
    with mapping(Steps=StepsAtOnce):
        run(InTurn({"scale": 1.0}, {"scale": 2.0}).eval())
    assert found == ["Steps"]


def test_floats_that_vary_share_a_key(monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Steps()

        def forward(self, x, scale):
            return self.layer(x, scale=scale * 2)

    found, model, x = measured_layers(monkeypatch), Scaled().eval(), torch.zeros(3, 4)
    with mapping(Steps=StepsAtOnce), torch.no_grad():
        made = compiled(model)
        for scale in (1.0, 2.0, 3.0, 4.0):
            assert torch.equal(made(x, scale), torch.full((3, 4), 2 * scale))
    assert found == ["Steps"]


def test_layout_compiler_dtype_mode_and_kernel_are_part_of_the_key(monkeypatch):
    """Each of these has another key; the same call again has the same key."""
    found = measured_layers(monkeypatch)
    base = stack(1.0)[:1]
    wide = torch.zeros(3, 8)[:, ::2]
    with mapping(Work=kernel(0.5, plus=0)):
        for model, x, options in [
            (base, torch.zeros(3, 4), {}),
            (base, wide, {}),
            (stack(2.0)[:1], torch.zeros(3, 4), {}),
            (base, torch.zeros(3, 4), {"inner": "aot_eager"}),
            (base.double(), torch.zeros(3, 4, dtype=torch.float64), {}),
        ]:
            run(model, x, **options)
            run(model, x, **options)
        base.float()
        with torch.enable_grad():
            compiled(base)(torch.zeros(3, 4))
    with mapping(Work=kernel(0.5, plus=20)):
        torch.compiler.reset()
        run(base)
    assert len(found) == 7


def test_compiler_and_its_settings_are_part_of_the_key():
    """Settings of Inductor count too, wherever they were made."""
    text = tuning_keys.compiler_text
    kinds = {text(Options()), text(Options(inner="eager")), text(Options(inner=print))}
    kinds |= {text(Options.parse(mode)) for mode in (None, "max-autotune", "default")}
    kinds |= {text(Options(inductor={"max_autotune": True}))}
    kinds |= {text(Options(inner=functools.partial(print, 1)))}
    with torch._inductor.config.patch(max_autotune=True):
        kinds |= {text(Options()), text(Options(inner="eager"))}
    assert len(kinds) == 8


@pytest.mark.parametrize("of", ["torch", "driver", "triton", "kernelgraph"])
def test_versions_of_software_are_part_of_the_key(monkeypatch, of):
    model = stack(1.0)[:1]
    with mapping(Work=kernel(0.5)):
        run(model)
        torch.compiler.reset()
        found = measured_layers(monkeypatch)
        if of == "triton":
            monkeypatch.setattr(keys, "_triton_version", lambda: "99")
        elif of == "driver":
            monkeypatch.setattr(tuning_keys, "driver_version", lambda: "99")
        else:
            monkeypatch.setattr({"torch": torch, "kernelgraph": _version}[of],
                                "__version__", "99.0")  # fmt: skip
        run(model)
    assert found == (["Work"] if of != "driver" else [])  # the CPU has none
