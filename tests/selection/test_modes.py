"""Modes: which unions exist, which modes serve each, and how they are written."""

import copy
import functools
import itertools
import operator
import pickle

import pytest

from kernelgraph.selection.modes import REGISTRABLE, KernelizeFallback, Mode, serving_modes
from tests.support.messages import whole

SINGLE = [Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE, Mode.FALLBACK]
INFERENCE_COMPILE = Mode.INFERENCE | Mode.TORCH_COMPILE
TRAINING_COMPILE = Mode.TRAINING | Mode.TORCH_COMPILE

EXCLUDE = "INFERENCE and TRAINING exclude each other, got INFERENCE | TRAINING"
ALONE = "FALLBACK does not join with other modes, got "


def allowed(members):
    """Whether these modes may be joined, by another statement of the rule."""
    chosen = set(members)
    if Mode.FALLBACK in chosen and len(chosen) > 1:
        return False
    return not {Mode.INFERENCE, Mode.TRAINING} <= chosen


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_union_is_made_or_refused_in_every_order(length):
    for members in itertools.product(SINGLE, repeat=length):
        bits = functools.reduce(operator.or_, (m.value for m in members))
        if allowed(members):
            union = functools.reduce(operator.or_, members)
            assert union.value == bits
            assert union is Mode(bits)
            assert all(m in union for m in members)
        else:
            with pytest.raises(ValueError, match=r"exclude each other|does not join"):
                functools.reduce(operator.or_, members)
            with pytest.raises(ValueError, match=r"exclude each other|does not join"):
                Mode(bits)


def test_a_refused_union_says_why():
    with pytest.raises(ValueError, match=whole(EXCLUDE)):
        Mode.INFERENCE | Mode.TRAINING
    with pytest.raises(ValueError, match=whole(f"{EXCLUDE} | TORCH_COMPILE")):
        INFERENCE_COMPILE | Mode.TRAINING
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TORCH_COMPILE):
        for left, right in ((mode, Mode.FALLBACK), (Mode.FALLBACK, mode)):
            with pytest.raises(ValueError, match=whole(f"{ALONE}{mode} | FALLBACK")):
                left | right


def test_a_union_is_refused_again_after_the_first_time():
    for _ in range(3):
        with pytest.raises(ValueError, match="exclude each other"):
            Mode.INFERENCE | Mode.TRAINING
        with pytest.raises(ValueError, match="exclude each other"):
            Mode(Mode.INFERENCE.value + Mode.TRAINING.value)


def test_other_operators_make_no_refused_union_either():
    with pytest.raises(ValueError, match="exclude each other"):
        Mode.INFERENCE ^ Mode.TRAINING
    with pytest.raises(ValueError, match="exclude each other"):
        ~Mode(0)
    with pytest.raises(ValueError, match="exclude each other"):
        Mode(-1)
    with pytest.raises(TypeError):
        1 | Mode.TRAINING
    assert INFERENCE_COMPILE ^ Mode.TORCH_COMPILE is Mode.INFERENCE
    assert INFERENCE_COMPILE & Mode.TORCH_COMPILE is Mode.TORCH_COMPILE
    assert not Mode.INFERENCE & Mode.TRAINING


def test_a_refused_union_in_place_changes_nothing():
    mode = Mode.TRAINING
    mode |= Mode.TORCH_COMPILE
    assert mode is TRAINING_COMPILE
    with pytest.raises(ValueError, match="exclude each other"):
        mode |= Mode.INFERENCE
    assert mode is TRAINING_COMPILE


@pytest.mark.parametrize("value", [16, 1024, "INFERENCE", 1.5, None])
def test_other_values_are_no_modes(value):
    with pytest.raises((ValueError, TypeError)):
        Mode(value)


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (Mode.INFERENCE, "INFERENCE"),
        (Mode.TRAINING, "TRAINING"),
        (Mode.TORCH_COMPILE, "TORCH_COMPILE"),
        (Mode.FALLBACK, "FALLBACK"),
        (INFERENCE_COMPILE, "INFERENCE | TORCH_COMPILE"),
        (Mode.TORCH_COMPILE | Mode.TRAINING, "TRAINING | TORCH_COMPILE"),
        (Mode(0), "NONE"),
    ],
)
def test_modes_are_written_by_their_names(mode, text):
    assert str(mode) == text
    assert f"{mode}" == text
    assert f"{mode:>30}" == text.rjust(30)


@pytest.mark.parametrize("mode", [*SINGLE, INFERENCE_COMPILE, TRAINING_COMPILE])
def test_modes_survive_pickling_and_copying_as_themselves(mode):
    assert pickle.loads(pickle.dumps(mode)) is mode
    assert copy.deepcopy(mode) is mode


def test_modes_that_serve_a_mode_come_the_best_first():
    assert serving_modes(Mode.INFERENCE) == (
        Mode.INFERENCE,
        INFERENCE_COMPILE,
        Mode.TRAINING,
        TRAINING_COMPILE,
        Mode.FALLBACK,
    )
    assert serving_modes(INFERENCE_COMPILE) == (INFERENCE_COMPILE, TRAINING_COMPILE, Mode.FALLBACK)
    assert serving_modes(Mode.TRAINING) == (Mode.TRAINING, TRAINING_COMPILE, Mode.FALLBACK)
    assert serving_modes(TRAINING_COMPILE) == (TRAINING_COMPILE, Mode.FALLBACK)


def test_registrable_modes_are_those_that_serve_one():
    assert {*SINGLE, INFERENCE_COMPILE, TRAINING_COMPILE} - {Mode.TORCH_COMPILE} == REGISTRABLE


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)])
def test_no_mode_serves_without_inference_or_training(mode):
    with pytest.raises(
        ValueError,
        match=whole(
            f"mode must contain INFERENCE or TRAINING (FALLBACK is for mappings only), got {mode}"
        ),
    ):
        serving_modes(mode)


@pytest.mark.parametrize("mode", ["INFERENCE", 1, None, KernelizeFallback.NO_LAYER])
def test_serving_modes_wants_a_mode(mode):
    with pytest.raises(TypeError, match=whole(f"mode: expected a kernelgraph Mode, got {mode!r}")):
        serving_modes(mode)


def test_default_fallback_is_all_cases_but_unloadable_kernels():
    default = [
        KernelizeFallback.NO_LAYER,
        KernelizeFallback.NO_DEVICE,
        KernelizeFallback.NO_COMPATIBLE_PROPERTIES,
        KernelizeFallback.NO_COMPATIBLE_MODE,
    ]
    assert functools.reduce(operator.or_, default) is KernelizeFallback.DEFAULT
    assert KernelizeFallback.DEFAULT | KernelizeFallback.CANNOT_LOAD is KernelizeFallback.ALL
    assert KernelizeFallback.CANNOT_LOAD not in KernelizeFallback.DEFAULT
    assert not KernelizeFallback.NONE
    assert len({case.value for case in [*default, KernelizeFallback.CANNOT_LOAD]}) == 5
    assert KernelizeFallback.NO_LAYER not in (
        KernelizeFallback.DEFAULT & ~KernelizeFallback.NO_LAYER
    )
