"""The options of the backend."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from kernelgraph import Mode
from kernelgraph.graph.compile.backend import hubkernels
from kernelgraph.graph.lowering.options import Options, options_of_backend

TRAINING = Mode.TRAINING | Mode.TORCH_COMPILE
INFERENCE = Mode.INFERENCE | Mode.TORCH_COMPILE


OURS = (
    "policy, measure_seconds, inner, kernel_mode, verify, verify_gradients, wrong_gradient and "
    "own_backward"
)


def compiler(graph_module: Any, example_inputs: Any) -> Any:
    return graph_module


def test_no_options_are_the_defaults(monkeypatch):
    monkeypatch.delenv("KERNELGRAPH_POLICY")
    assert Options.parse() == Options("fastest", "inductor", None, {}, None)
    assert Options.parse(None, {}) == Options("fastest")


def test_environment_variable_changes_the_default_policy(monkeypatch):
    monkeypatch.setenv("KERNELGRAPH_POLICY", "never")
    assert Options.parse().policy == "never"
    assert Options.parse(None, {"policy": "always"}).policy == "always"
    monkeypatch.setenv("KERNELGRAPH_POLICY", "")
    assert Options.parse().policy == "fastest"
    monkeypatch.setenv("KERNELGRAPH_POLICY", "maybe")
    with pytest.raises(ValueError, match="KERNELGRAPH_POLICY is one of fastest, always, never"):
        Options.parse()


def test_cuda_graphs_are_found_switched_off_and_cut():
    """Programs that are measured are compiled without them, and in the same way otherwise."""
    assert not Options.parse().cuda_graphs
    for mode, options in (("reduce-overhead", {}), (None, {"triton.cudagraphs": True})):
        parsed = Options.parse(mode, {"max_autotune": True, **options})
        assert parsed.cuda_graphs
        assert not parsed.without_cuda_graphs().cuda_graphs
        assert parsed.without_cuda_graphs().inductor == {"max_autotune": True}
    assert Options.parse("max-autotune").without_cuda_graphs().inductor_mode == (
        "max-autotune-no-cudagraphs"
    )
    assert not Options.parse("reduce-overhead", {"triton.cudagraphs": False}).cuda_graphs
    given = {"custom_should_partition_ops": ["a::b"]}
    cut = Options.parse("reduce-overhead", given).cutting_around(["hubkernels::c"])
    assert cut.inductor == {"custom_should_partition_ops": ["a::b", "hubkernels::c"]}
    assert Options.parse().cutting_around([]) == Options.parse()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("policy", "always", "always"),
        ("policy", "never", "never"),
        ("policy", "fastest", "fastest"),
        ("measure_seconds", 5, 5.0),
        ("measure_seconds", 0, 0.0),
        ("inner", "inductor", "inductor"),
        ("inner", "aot_eager", "aot_eager"),
        ("inner", "eager", "eager"),
        ("inner", compiler, compiler),
        ("kernel_mode", None, None),
        ("verify", False, False),
        ("verify", True, True),
        ("kernel_mode", Mode.INFERENCE, INFERENCE),
        ("kernel_mode", Mode.TRAINING, TRAINING),
        ("kernel_mode", TRAINING, TRAINING),
    ],
)
def test_each_option_is_parsed(name, value, expected):
    parsed = Options.parse(None, {name: value})
    assert getattr(parsed, name) == expected
    assert parsed == Options(**{name: expected})


def test_options_of_inductor_go_to_inductor():
    given = {"max_autotune": True, "triton.cudagraphs": False, "epilogue-fusion": True}
    parsed = Options.parse("max-autotune", {**given, "policy": "never"})
    assert parsed.inductor == given
    assert parsed.inductor_mode == "max-autotune"
    assert parsed.policy == "never"


def test_given_options_are_not_changed():
    given = {"policy": "never", "max_autotune": True}
    Options.parse(None, given)
    assert given == {"policy": "never", "max_autotune": True}


@pytest.mark.parametrize(
    ("mode", "options", "error", "message"),
    [
        (None, {"measure_seconds": "5"}, TypeError, "option measure_seconds is a number, not '5'"),
        (None, {"measure_seconds": True}, TypeError, "measure_seconds is a number, not True"),
        (None, {"measure_seconds": -1}, ValueError, "is a number from 0 on, not -1"),
        (None, {"measure_seconds": float("nan")}, ValueError, "is a number from 0 on, not nan"),
        (None, {"measure_seconds": float("inf")}, ValueError, "is a number from 0 on, not inf"),
        (
            None,
            {"policy": "sometimes"},
            ValueError,
            "option policy is one of fastest, always, never, not 'sometimes'",
        ),
        (
            None,
            {"policy": ["always"]},
            ValueError,
            "policy is one of fastest, always, never, not [",
        ),
        (
            None,
            {"policy": None},
            ValueError,
            "policy is one of fastest, always, never, not None",
        ),
        (
            None,
            {"inner": "cudagraphs"},
            ValueError,
            "option inner is one of inductor, aot_eager, eager or a callable that takes a graph "
            "module and example inputs, not 'cudagraphs'",
        ),
        (None, {"inner": None}, ValueError, "option inner is one of inductor, aot_eager, eager or"),
        (None, {"inner": ["eager"]}, ValueError, "option inner is one of inductor, aot_eager"),
        (
            None,
            {"kernel_mode": "inference"},
            TypeError,
            "option kernel_mode is a kernelgraph.Mode, not 'inference'",
        ),
        (None, {"verify": 1}, TypeError, "option verify is a bool, not 1"),
        (None, {"own_backward": None}, TypeError, "option own_backward is a bool, not None"),
        (None, {"verify_gradients": 1}, TypeError, "verify_gradients is True or False, not 1"),
        (
            None,
            {"wrong_gradient": "ignore"},
            ValueError,
            'wrong_gradient is "recompute" or "reference", not \'ignore\'',
        ),
        (None, {"kernel_mode": 1}, TypeError, "option kernel_mode is a kernelgraph.Mode, not 1"),
        (
            None,
            {"kernel_mode": Mode.FALLBACK},
            ValueError,
            "mode must contain INFERENCE or TRAINING",
        ),
        (
            None,
            {"kernel_mode": Mode.TORCH_COMPILE},
            ValueError,
            "mode must contain INFERENCE or TRAINING",
        ),
        (
            None,
            {"polcy": "never", "max_autotune": True, "another": 1},
            ValueError,
            f"unknown option another, polcy: neither one of hubkernels ({OURS}) nor one of "
            "Inductor's (torch._inductor.list_options())",
        ),
        (None, {1: 2}, TypeError, "the name of an option is a string, not 1"),
        (
            None,
            {"inner": "eager", "max_autotune": True},
            ValueError,
            f"max_autotune: not an option of hubkernels ({OURS}), "
            "and Inductor's do not go with inner='eager'",
        ),
        (
            "max-autotune",
            {"inner": "aot_eager"},
            ValueError,
            f"mode='max-autotune': not an option of hubkernels ({OURS}), "
            "and Inductor's do not go with inner='aot_eager'",
        ),
        (
            "reduce-overhead",
            {"inner": "eager", "max_autotune": True},
            ValueError,
            "max_autotune, mode='reduce-overhead': not an option of hubkernels",
        ),
    ],
)
def test_wrong_option_is_an_error_that_names_it(mode, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Options.parse(mode, options)


def test_default_mode_is_taken_with_any_inner_compiler():
    assert Options.parse("default", {"inner": "eager"}).inner == "eager"


def test_options_of_another_backend_are_none():
    assert options_of_backend(compiler, {"options": {"policy": "never"}}) is None
    assert options_of_backend(hubkernels, {}) == Options()
    given = {"mode": "max-autotune", "options": {"policy": "never"}}
    assert options_of_backend(hubkernels, given) == Options("never", inductor_mode="max-autotune")
    assert options_of_backend(functools.partial(compiler), {}) is None
