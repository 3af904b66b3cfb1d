"""Mappings: what may be registered, and what becomes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.selection.devices import Device, Target
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.matching import selections
from kernelgraph.selection.modes import Mode
from kernelgraph.selection.scopes import (
    current_mapping,
    register_kernel_mapping,
    use_kernel_mapping,
)
from tests.support.mappings import (
    INF_C,
    MAPPINGS,
    TRA,
    A,
    B,
    C,
    Repo,
    Unhashable,
    cuda,
    parsed,
    view,
)
from tests.support.messages import whole


def test_two_names_of_one_device_in_one_dict_count_in_order():
    assert parsed({"Norm": {"metal": A, "mps": B}}) == parsed({"Norm": {"mps": B}})
    assert parsed({"Norm": {Device("cuda"): A, "cuda": B}}) == parsed({"Norm": {"cuda": B}})
    assert selections(parsed({"Norm": {"metal": A}}), "Norm", Target("mps"), TRA)[0].repository is A


def test_mappings_are_equal_by_what_is_registered():
    left, right = parsed({"N": {"cpu": A}, "M": {}}), parsed({"M": {}}, {"N": {"cpu": A}})
    assert left == right
    assert hash(left) == hash(right)
    assert left != parsed({"N": {"cpu": B}, "M": {}})
    assert parsed({"N": {"cpu": A, "npu": B}}) != parsed({"N": {"npu": B, "cpu": A}})


def test_merging_changes_neither_mapping():
    older, newer = parsed({"N": {"cpu": A}}), parsed({"N": {"cpu": B}, "M": {"cpu": C}})
    older.merge(newer)
    assert older == parsed({"N": {"cpu": A}})
    assert newer == parsed({"N": {"cpu": B}, "M": {"cpu": C}})


@given(mappings=st.lists(MAPPINGS, max_size=4))
def test_merging_is_associative(mappings):
    parts = [KernelMapping.parse(mapping) for mapping in mappings]
    right = KernelMapping()
    for part in reversed(parts):
        right = part.merge(right)
    assert parsed(*mappings) == right


# --- what may be registered -------------------------------------------------------------------


class HasNoLoad:
    load = 3


BAD = [
    ([], TypeError, "mapping: expected a dict from layer name to devices, got list"),
    ({3: {}}, TypeError, "mapping: expected layer names (str) as keys, got 3"),
    ({"N": A}, TypeError, 'mapping["N"]: expected a dict from device to repository, got {Repo}'),
    (
        {"N": None},
        TypeError,
        'mapping["N"]: expected a dict from device to repository, got NoneType',
    ),
    (
        {"N": {"gpu": A}},
        ValueError,
        'mapping["N"]: unknown device type "gpu": there are cpu, cuda, rocm, mps, npu, xpu,'
        " neuron, tpu (metal means mps)",
    ),
    (
        {"N": {3: A}},
        TypeError,
        'mapping["N"]: expected a device type (str) or a Device, got int',
    ),
    (
        {"N": {"cuda": 3}},
        TypeError,
        'mapping["N"]["cuda"]: expected a repository (an object with load()) or a dict from Mode'
        " to repository, got int",
    ),
    (
        {"N": {cuda(80, 90): None}},
        TypeError,
        "mapping[\"N\"][Device(type='cuda', properties=CUDAProperties(min_capability=80,"
        " max_capability=90))]: expected a repository (an object with load()) or a dict from Mode"
        " to repository, got NoneType",
    ),
    (
        {"N": {"cuda": HasNoLoad()}},
        TypeError,
        'mapping["N"]["cuda"]: expected a repository (an object with load()) or a dict from Mode'
        " to repository, got {HasNoLoad}",
    ),
    (
        {"N": {"cuda": Repo}},
        TypeError,
        'mapping["N"]["cuda"]: expected a repository (an object with load()) or a dict from Mode'
        " to repository, got the class Repo; pass an instance of it",
    ),
    (
        {"N": {"cuda": Unhashable()}},
        TypeError,
        'mapping["N"]["cuda"]: a repository must be hashable, and {Unhashable} is not',
    ),
    (
        {"N": {"cuda": {"training": A}}},
        TypeError,
        'mapping["N"]["cuda"]: expected Mode keys, got "training"',
    ),
    (
        {"N": {"cuda": {Mode.TORCH_COMPILE: A}}},
        ValueError,
        'mapping["N"]["cuda"]: a kernel under mode TORCH_COMPILE would never be used: name'
        " INFERENCE or TRAINING with it, or FALLBACK alone",
    ),
    (
        {"N": {"cuda": {Mode(0): A}}},
        ValueError,
        'mapping["N"]["cuda"]: a kernel under mode NONE would never be used: name INFERENCE or'
        " TRAINING with it, or FALLBACK alone",
    ),
    (
        {"N": {"cuda": {Mode.INFERENCE: 3}}},
        TypeError,
        'mapping["N"]["cuda"][INFERENCE]: expected a repository (an object with load()), got int',
    ),
    (
        {"N": {"cuda": {INF_C: Repo}}},
        TypeError,
        'mapping["N"]["cuda"][INFERENCE | TORCH_COMPILE]: expected a repository (an object with'
        " load()), got the class Repo; pass an instance of it",
    ),
    (
        {"N": {"cuda": {Mode.INFERENCE: {Mode.INFERENCE: A}}}},
        TypeError,
        'mapping["N"]["cuda"][INFERENCE]: expected a repository (an object with load()), got dict',
    ),
]


def with_modules(message):
    """``message`` with the module of each class that it has in braces."""
    classes = (Repo, Unhashable, HasNoLoad)
    return message.format_map({cls.__name__: f"{cls.__module__}.{cls.__name__}" for cls in classes})


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_a_bad_entry_is_refused_by_its_key_and_nothing_counts(bad, error, message):
    # The good entries stand before and after, so that half a registration would show.
    if isinstance(bad, dict):
        bad = {"Before": {"cpu": B}, **bad, "After": {"cpu": B}}
        if isinstance(bad.get("N"), dict):
            bad["N"] = {"cpu": B, **bad["N"], "npu": B}
    register_kernel_mapping({"N": {"cpu": A}})

    def check():
        before = current_mapping()
        for inherit in (True, False):
            with pytest.raises(error, match=whole(with_modules(message))):
                register_kernel_mapping(bad, inherit_mapping=inherit)
            assert current_mapping() is before
            with pytest.raises(error, match=whole(with_modules(message))):
                use_kernel_mapping(bad, inherit_mapping=inherit)
            assert current_mapping() is before

    check()
    with use_kernel_mapping({"N": {"npu": C}}):
        check()
    assert current_mapping() == parsed({"N": {"cpu": A}})


def test_empty_dicts_are_accepted_everywhere():
    register_kernel_mapping({"N": {"cpu": {}}, "M": {}})
    register_kernel_mapping({})
    assert current_mapping() == parsed({"N": {"cpu": {}}, "M": {}})


@given(mapping=MAPPINGS)
def test_the_callers_dicts_are_neither_changed_nor_aliased(mapping):
    def shape(value):
        return {key: shape(v) for key, v in value.items()} if isinstance(value, dict) else id(value)

    before = shape(mapping)
    register_kernel_mapping({}, inherit_mapping=False)
    register_kernel_mapping(mapping)
    with use_kernel_mapping(mapping):
        register_kernel_mapping({"Norm": {"cpu": A}, "Other": {"cpu": A}})
    register_kernel_mapping({"Norm": {"cpu": {Mode.INFERENCE: B}}})
    assert shape(mapping) == before

    register_kernel_mapping(mapping, inherit_mapping=False)
    scope = use_kernel_mapping(mapping, inherit_mapping=False)
    registered = view(current_mapping())
    for devices in mapping.values():
        for value in devices.values():
            if isinstance(value, dict):
                value.clear()
                value[Mode.FALLBACK] = Repo("late")
        devices["npu"] = Repo("late")
    mapping["Late"] = {}
    assert view(current_mapping()) == registered
    with scope:
        assert view(current_mapping()) == registered
