"""Matching: which of the registered kernels serves a layer, by example and against an oracle."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraph.report import Reason
from kernelgraph.selection.devices import Device, Target
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.matching import Rejection, Selection, selections
from kernelgraph.selection.modes import Mode
from tests.support.mappings import (
    FALL,
    INF,
    INF_C,
    MAPPINGS,
    MODES,
    TARGETS,
    TRA,
    TRA_C,
    A,
    B,
    C,
    Repo,
    cuda,
    parsed,
)

# Which registered modes serve a mode, the best first: the table of the README, typed again.
TABLE = {
    INF: [INF, INF_C, TRA, TRA_C, FALL],
    INF_C: [INF_C, TRA_C, FALL],
    TRA: [TRA, TRA_C, FALL],
    TRA_C: [TRA_C, FALL],
}
ASKED = list(TABLE)


def first_match(mapping, layer_name, target, mode):
    """The kernel that is chosen, or why there is none."""
    found = selections(mapping, layer_name, target, mode)
    return found if isinstance(found, Rejection) else found[0]


def chosen(outcome):
    assert isinstance(outcome, Selection), outcome
    return outcome.repository


# --- by example ---------------------------------------------------------------------------------


def test_a_repository_without_modes_serves_every_mode_as_fallback():
    mapping = parsed({"Norm": {"cpu": A}})
    for mode in ASKED:
        outcome = first_match(mapping, "Norm", Target("cpu"), mode)
        assert outcome == Selection(A, Mode.FALLBACK, Device("cpu"))


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_the_table_of_modes_over_every_set_of_registered_modes(asked):
    for flags in itertools.product([False, True], repeat=len(MODES)):
        repos = {mode: Repo(str(mode)) for mode, there in zip(MODES, flags, strict=True) if there}
        outcome = first_match(parsed({"Norm": {"cpu": repos}}), "Norm", Target("cpu"), asked)
        serving = [mode for mode in TABLE[asked] if mode in repos]
        every = selections(parsed({"Norm": {"cpu": repos}}), "Norm", Target("cpu"), asked)
        if serving:
            assert outcome == Selection(repos[serving[0]], serving[0], Device("cpu"))
            assert every == tuple(Selection(repos[mode], mode, Device("cpu")) for mode in serving)
        else:
            assert outcome.reason is Reason.NO_MODE
            assert every == outcome


def test_what_serves_in_several_modes_is_one_candidate():
    mapping = parsed({"Norm": {"cpu": {INF_C: A, TRA_C: B, FALL: A}}})
    found = selections(mapping, "Norm", Target("cpu"), INF_C)
    assert [(s.repository, s.mode) for s in found] == [(A, INF_C), (B, TRA_C)]


def test_the_narrowest_interval_wins_wherever_it_stands():
    devices = {cuda(80, 90): A, cuda(86, 86): B, "cuda": C, cuda(0, 10**9): Repo("all")}
    for order in itertools.permutations(devices.items()):
        mapping = parsed({"Norm": dict(order)})
        assert chosen(first_match(mapping, "Norm", Target("cuda", 86), Mode.INFERENCE)) is B
        assert chosen(first_match(mapping, "Norm", Target("cuda", 80), Mode.INFERENCE)) is A
        assert chosen(first_match(mapping, "Norm", Target("cuda", 90), Mode.INFERENCE)) is A
        assert (
            chosen(first_match(mapping, "Norm", Target("cuda", 91), Mode.INFERENCE)).name == "all"
        )
        assert chosen(first_match(mapping, "Norm", Target("cuda", None), Mode.INFERENCE)) is C


def test_among_equal_widths_the_last_registered_wins():
    at_85 = Target("cuda", 85)
    for first, second in itertools.permutations([(cuda(80, 90), A), (cuda(84, 94), B)]):
        together = parsed({"Norm": dict([first, second])})
        apart = parsed({"Norm": dict([first])}, {"Norm": dict([second])})
        assert chosen(first_match(together, "Norm", at_85, Mode.INFERENCE)) is second[1]
        assert chosen(first_match(apart, "Norm", at_85, Mode.INFERENCE)) is second[1]


def test_the_same_bounds_again_count_as_the_last_registered():
    mapping = parsed(
        {"Norm": {cuda(80, 90): A}}, {"Norm": {cuda(84, 94): B}}, {"Norm": {cuda(80, 90): C}}
    )
    assert chosen(first_match(mapping, "Norm", Target("cuda", 85), Mode.INFERENCE)) is C


def test_the_same_device_again_replaces_all_its_modes():
    mapping = parsed(
        {"Norm": {"cpu": {Mode.INFERENCE: A, Mode.FALLBACK: A}}},
        {"Norm": {Device("cpu"): {Mode.TRAINING: B}}},
    )
    assert chosen(first_match(mapping, "Norm", Target("cpu"), Mode.INFERENCE)) is B
    assert first_match(mapping, "Norm", Target("cpu"), INF_C) == Rejection(
        Reason.NO_MODE, "registered modes: TRAINING"
    )


def test_no_wider_entry_stands_in_for_one_whose_modes_do_not_fit():
    mapping = parsed({"Norm": {"cuda": A, cuda(86, 86): {Mode.TRAINING: B}}})
    assert first_match(mapping, "Norm", Target("cuda", 86), INF_C) == Rejection(
        Reason.NO_MODE, "registered modes: TRAINING"
    )
    assert chosen(first_match(mapping, "Norm", Target("cuda", 87), INF_C)) is A


@pytest.mark.parametrize(
    ("mapping", "target", "mode", "reason", "detail"),
    [
        ({}, Target("cpu"), INF, Reason.NO_LAYER, "registered layers: none"),
        ({"A": {}, "B": {}}, Target("cpu"), INF, Reason.NO_LAYER, "registered layers: A, B"),
        (
            {f"L{i}": {} for i in range(11)},
            Target("cpu"),
            INF,
            Reason.NO_LAYER,
            "registered layers: L0, L1, L2, L3, L4, L5, L6, L7 and 3 more",
        ),
        ({"Norm": {}}, Target("cpu"), INF, Reason.NO_DEVICE, "registered for: none"),
        (
            {"Norm": {cuda(80, 90): A, "rocm": B}},
            Target("cpu"),
            INF,
            Reason.NO_DEVICE,
            "registered for: cuda 80-90, rocm",
        ),
        (
            {"Norm": {cuda(80, 90): A, "rocm": B, cuda(70, 70): A}},
            Target("cuda", 91),
            INF,
            Reason.NO_CAPABILITY,
            "registered for: cuda 80-90, cuda 70",
        ),
        (
            {"Norm": {cuda(80, 90): A}},
            Target("cuda", None),
            INF,
            Reason.NO_CAPABILITY,
            "the device's capability is unknown; registered for: cuda 80-90",
        ),
        (
            {"Norm": {"cpu": {INF: A, TRA: B}}},
            Target("cpu"),
            TRA_C,
            Reason.NO_MODE,
            "registered modes: INFERENCE, TRAINING",
        ),
        ({"Norm": {"cpu": {}}}, Target("cpu"), INF, Reason.NO_MODE, "registered modes: none"),
    ],
)
def test_a_rejection_says_what_there_was_instead(mapping, target, mode, reason, detail):
    assert first_match(parsed(mapping), "Norm", target, mode) == Rejection(reason, detail)


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)], ids=str)
def test_matching_wants_inference_or_training_even_for_an_unknown_layer(mode):
    with pytest.raises(ValueError, match=f"^mode must contain INFERENCE or TRAINING .*got {mode}$"):
        first_match(KernelMapping(), "Norm", Target("cpu"), mode)


def test_outcomes_are_frozen():
    mapping = parsed({"Norm": {"cpu": A}})
    selection = first_match(mapping, "Norm", Target("cpu"), Mode.INFERENCE)
    rejection = first_match(mapping, "Other", Target("cpu"), Mode.INFERENCE)
    with pytest.raises(AttributeError):
        selection.repository = B
    with pytest.raises(AttributeError):
        rejection.detail = ""
    with pytest.raises(AttributeError):
        mapping.layers = {}
    with pytest.raises(TypeError):
        mapping.layers["Norm"] = ()


# --- against an oracle ---------------------------------------------------------------------------


def registrations_of(mappings):
    """(layer, device type, bounds or None, {mode: repository}), in the order of registration."""
    for mapping in mappings:
        for layer, devices in mapping.items():
            for key, value in devices.items():
                kind = key if isinstance(key, str) else key.type
                bounds = None
                if isinstance(key, Device) and key.properties is not None:
                    bounds = (key.properties.min_capability, key.properties.max_capability)
                modes = value if isinstance(value, dict) else {FALL: value}
                yield layer, {"metal": "mps"}.get(kind, kind), bounds, modes


def oracle(mappings, layer, target, asked):
    """The first match, by brute force over the list of all that was ever registered."""
    if not any(layer in mapping for mapping in mappings):
        return Reason.NO_LAYER
    registrations = list(registrations_of(mappings))
    fitting = {}
    for when, (_, kind, bounds, modes) in enumerate(r for r in registrations if r[0] == layer):
        if kind != target.type:
            continue
        if bounds is None or (
            target.capability is not None and bounds[0] <= target.capability <= bounds[1]
        ):
            width = 10**9 if bounds is None else bounds[1] - bounds[0]
            fitting[bounds] = (-width, when, modes)
    if not any(r[:2] == (layer, target.type) for r in registrations):
        return Reason.NO_DEVICE
    if not fitting:
        return Reason.NO_CAPABILITY
    winner, (_, _, modes) = max(fitting.items(), key=lambda item: item[1][:2])
    for mode in TABLE[asked]:
        if mode in modes:
            return modes[mode], mode, (target.type, winner)
    return Reason.NO_MODE


@settings(max_examples=250)
@given(mappings=st.lists(MAPPINGS, max_size=6), target=TARGETS, asked=st.sampled_from(ASKED))
def test_the_first_match_agrees_with_the_oracle(mappings, target, asked):
    mapping = parsed(*mappings)
    for layer in ("Norm", "Gate"):
        outcome = first_match(mapping, layer, target, asked)
        expected = oracle(mappings, layer, target, asked)
        if isinstance(expected, Reason):
            assert isinstance(outcome, Rejection)
            assert outcome.reason is expected
        else:
            properties = outcome.device.properties
            bounds = properties and (properties.min_capability, properties.max_capability)
            assert (outcome.repository, outcome.mode) == expected[:2]
            assert (outcome.device.type, bounds) == expected[2]


# --- without torch ----------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import kernelgraph.report
from kernelgraph.selection import CUDAProperties, Device, Mode, Target, current_mapping
from kernelgraph.selection import register_kernel_mapping, selections, target_of

class Repo:
    def load(self):
        raise AssertionError

register_kernel_mapping({"Norm": {Device("cuda", CUDAProperties(80, 90)): Repo(), "cpu": Repo()}})
print(selections(current_mapping(), "Norm", Target("cuda", 86), Mode.INFERENCE)[0].device)
print(selections(current_mapping(), "Norm", target_of("cpu"), Mode.TRAINING)[0].device)
print(selections(current_mapping(), "Norm", Target("cuda", 91), Mode.INFERENCE).reason.name)
"""


def test_matching_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["cuda 80-90", "cpu", "NO_CAPABILITY", ""]
