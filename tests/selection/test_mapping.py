"""What is registered, where it is seen, and which kernel it makes."""

import asyncio
import contextlib
import inspect
import itertools
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernelgraph.report import Reason
from kernelgraph.selection.devices import CUDAProperties, Device, ROCMProperties, Target
from kernelgraph.selection.mapping import (
    KernelMapping,
    Rejection,
    Selection,
    current_mapping,
    register_kernel_mapping,
    select,
    selections,
    use_kernel_mapping,
)
from kernelgraph.selection.modes import Mode


def whole(message):
    return rf"\A{re.escape(message)}\Z"


class Repo:
    """A repository that is told apart by its name."""

    def __init__(self, name=""):
        self.name = name

    def __repr__(self):
        return f"Repo({self.name!r})"

    def load(self):
        raise AssertionError("nothing is loaded in order to choose")

    def __deepcopy__(self, memo):
        raise AssertionError("repositories are not copied")


class Unhashable(Repo):
    __hash__ = None


A, B, C = Repo("a"), Repo("b"), Repo("c")
INF, TRA, FALL = Mode.INFERENCE, Mode.TRAINING, Mode.FALLBACK
INF_C, TRA_C = INF | Mode.TORCH_COMPILE, TRA | Mode.TORCH_COMPILE
MODES = [INF, INF_C, TRA, TRA_C, FALL]

# SPEC section 4's table, typed again.
TABLE = {
    INF: [INF, INF_C, TRA, TRA_C, FALL],
    INF_C: [INF_C, TRA_C, FALL],
    TRA: [TRA, TRA_C, FALL],
    TRA_C: [TRA_C, FALL],
}
ASKED = list(TABLE)


def cuda(low, high):
    return Device("cuda", CUDAProperties(low, high))


def rocm(low, high):
    return Device("rocm", ROCMProperties(low, high))


def chosen(outcome):
    assert isinstance(outcome, Selection), outcome
    return outcome.repository


def view(mapping):
    """A mapping as plain data: per layer, (device, modes) in the order that counts."""
    return {
        layer: [(entry.device, dict(entry.repositories)) for entry in entries]
        for layer, entries in mapping.layers.items()
    }


@pytest.fixture(autouse=True)
def nothing_registered():
    register_kernel_mapping({}, inherit_mapping=False)
    yield
    register_kernel_mapping({}, inherit_mapping=False)


# -- select, by example -----------------------------------------------------------------------


def parsed(*mappings):
    merged = KernelMapping()
    for mapping in mappings:
        merged = merged.merge(KernelMapping.parse(mapping))
    return merged


def test_a_repository_without_modes_serves_every_mode_as_fallback():
    mapping = parsed({"Norm": {"cpu": A}})
    for mode in ASKED:
        outcome = select(mapping, "Norm", Target("cpu"), mode)
        assert outcome == Selection(A, Mode.FALLBACK, Device("cpu"))


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_the_table_of_modes_over_every_set_of_registered_modes(asked):
    for flags in itertools.product([False, True], repeat=len(MODES)):
        repos = {mode: Repo(str(mode)) for mode, there in zip(MODES, flags, strict=True) if there}
        outcome = select(parsed({"Norm": {"cpu": repos}}), "Norm", Target("cpu"), asked)
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
        assert chosen(select(mapping, "Norm", Target("cuda", 86), Mode.INFERENCE)) is B
        assert chosen(select(mapping, "Norm", Target("cuda", 80), Mode.INFERENCE)) is A
        assert chosen(select(mapping, "Norm", Target("cuda", 90), Mode.INFERENCE)) is A
        assert chosen(select(mapping, "Norm", Target("cuda", 91), Mode.INFERENCE)).name == "all"
        assert chosen(select(mapping, "Norm", Target("cuda", None), Mode.INFERENCE)) is C


def test_among_equal_widths_the_last_registered_wins():
    at_85 = Target("cuda", 85)
    for first, second in itertools.permutations([(cuda(80, 90), A), (cuda(84, 94), B)]):
        together = parsed({"Norm": dict([first, second])})
        apart = parsed({"Norm": dict([first])}, {"Norm": dict([second])})
        assert chosen(select(together, "Norm", at_85, Mode.INFERENCE)) is second[1]
        assert chosen(select(apart, "Norm", at_85, Mode.INFERENCE)) is second[1]


def test_the_same_bounds_again_count_as_the_last_registered():
    mapping = parsed(
        {"Norm": {cuda(80, 90): A}}, {"Norm": {cuda(84, 94): B}}, {"Norm": {cuda(80, 90): C}}
    )
    assert chosen(select(mapping, "Norm", Target("cuda", 85), Mode.INFERENCE)) is C


def test_the_same_device_again_replaces_all_its_modes():
    mapping = parsed(
        {"Norm": {"cpu": {Mode.INFERENCE: A, Mode.FALLBACK: A}}},
        {"Norm": {Device("cpu"): {Mode.TRAINING: B}}},
    )
    assert chosen(select(mapping, "Norm", Target("cpu"), Mode.INFERENCE)) is B
    assert select(mapping, "Norm", Target("cpu"), INF_C) == Rejection(
        Reason.NO_MODE, "registered modes: TRAINING"
    )


def test_two_names_of_one_device_in_one_dict_count_in_order():
    assert parsed({"Norm": {"metal": A, "mps": B}}) == parsed({"Norm": {"mps": B}})
    assert parsed({"Norm": {Device("cuda"): A, "cuda": B}}) == parsed({"Norm": {"cuda": B}})
    assert chosen(select(parsed({"Norm": {"metal": A}}), "Norm", Target("mps"), TRA)) is A


def test_no_wider_entry_stands_in_for_one_whose_modes_do_not_fit():
    mapping = parsed({"Norm": {"cuda": A, cuda(86, 86): {Mode.TRAINING: B}}})
    assert select(mapping, "Norm", Target("cuda", 86), INF_C) == Rejection(
        Reason.NO_MODE, "registered modes: TRAINING"
    )
    assert chosen(select(mapping, "Norm", Target("cuda", 87), INF_C)) is A


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
    assert select(parsed(mapping), "Norm", target, mode) == Rejection(reason, detail)


@pytest.mark.parametrize("mode", [Mode.FALLBACK, Mode.TORCH_COMPILE, Mode(0)], ids=str)
def test_select_wants_inference_or_training_even_for_an_unknown_layer(mode):
    with pytest.raises(ValueError, match=f"^mode must contain INFERENCE or TRAINING .*got {mode}$"):
        select(KernelMapping(), "Norm", Target("cpu"), mode)


def test_outcomes_are_frozen():
    mapping = parsed({"Norm": {"cpu": A}})
    selection = select(mapping, "Norm", Target("cpu"), Mode.INFERENCE)
    rejection = select(mapping, "Other", Target("cpu"), Mode.INFERENCE)
    with pytest.raises(AttributeError):
        selection.repository = B
    with pytest.raises(AttributeError):
        rejection.detail = ""
    with pytest.raises(AttributeError):
        mapping.layers = {}
    with pytest.raises(TypeError):
        mapping.layers["Norm"] = ()


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


# -- select, against an oracle ----------------------------------------------------------------

BOUNDS = [70, 75, 80, 86, 90, 100]
INTERVALS = st.tuples(st.sampled_from(BOUNDS), st.sampled_from(BOUNDS)).map(sorted)
DEVICE_KEYS = st.one_of(
    st.sampled_from(["cpu", "cuda", "rocm", "mps", "metal", Device("cuda"), Device("metal")]),
    INTERVALS.map(lambda bounds: cuda(*bounds)),
    INTERVALS.map(lambda bounds: cuda(*bounds)),
    INTERVALS.map(lambda bounds: rocm(*bounds)),
)
REPOS = st.builds(Repo)
MAPPINGS = st.dictionaries(
    st.sampled_from(["Norm", "Gate"]),
    st.dictionaries(
        DEVICE_KEYS, st.one_of(REPOS, st.dictionaries(st.sampled_from(MODES), REPOS)), max_size=5
    ),
    max_size=2,
)
TARGETS = st.one_of(
    st.sampled_from([Target("cpu"), Target("mps"), Target("npu"), Target("rocm", 80)]),
    st.sampled_from([*BOUNDS, 69, 85, 101, None]).map(
        lambda capability: Target("cuda", capability)
    ),
)


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
    """SPEC sections 4, 5 and 7 over the list of all that was ever registered."""
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
def test_select_agrees_with_the_oracle(mappings, target, asked):
    mapping = parsed(*mappings)
    for layer in ("Norm", "Gate"):
        outcome = select(mapping, layer, target, asked)
        expected = oracle(mappings, layer, target, asked)
        if isinstance(expected, Reason):
            assert isinstance(outcome, Rejection)
            assert outcome.reason is expected
        else:
            properties = outcome.device.properties
            bounds = properties and (properties.min_capability, properties.max_capability)
            assert (outcome.repository, outcome.mode) == expected[:2]
            assert (outcome.device.type, bounds) == expected[2]


@given(mappings=st.lists(MAPPINGS, max_size=4))
def test_merging_is_associative(mappings):
    parts = [KernelMapping.parse(mapping) for mapping in mappings]
    right = KernelMapping()
    for part in reversed(parts):
        right = part.merge(right)
    assert parsed(*mappings) == right


# -- what may be registered -------------------------------------------------------------------


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
BAD = [(m, e, re.sub(r"\{(\w+)\}", rf"{__name__}.\1", text)) for m, e, text in BAD]


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
            with pytest.raises(error, match=whole(message)):
                register_kernel_mapping(bad, inherit_mapping=inherit)
            assert current_mapping() is before
            with pytest.raises(error, match=whole(message)):
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


# -- scopes, by example -----------------------------------------------------------------------


def in_thread(function):
    """What ``function`` returns in a thread started now."""
    result = Future()
    thread = threading.Thread(target=lambda: result.set_result(function()))
    thread.start()
    thread.join()
    return result.result()


def test_signatures():
    for function in (register_kernel_mapping, use_kernel_mapping):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == ["mapping", "inherit_mapping"]
        assert parameters["inherit_mapping"].default is True


def test_registering_merges_or_replaces():
    register_kernel_mapping({"N": {"cpu": A}})
    register_kernel_mapping({"M": {"cpu": B}})
    assert current_mapping() == parsed({"N": {"cpu": A}, "M": {"cpu": B}})
    register_kernel_mapping({"M": {"npu": C}}, False)
    assert current_mapping() == parsed({"M": {"npu": C}})


def test_scopes_nest_and_end():
    register_kernel_mapping({"N": {"cpu": A}})
    outside = current_mapping()
    with use_kernel_mapping({"M": {"cpu": B}}):
        inside = current_mapping()
        assert inside == parsed({"N": {"cpu": A}, "M": {"cpu": B}})
        with use_kernel_mapping({"K": {"cpu": C}}, inherit_mapping=False):
            assert current_mapping() == parsed({"K": {"cpu": C}})
        assert current_mapping() is inside
    assert current_mapping() is outside


def test_scopes_end_at_exceptions_and_let_them_pass():
    outside = current_mapping()

    @use_kernel_mapping({"N": {"cpu": A}})
    def body():
        with contextlib.suppress(ZeroDivisionError), use_kernel_mapping({"M": {"cpu": B}}):
            1 / 0  # noqa: B018
        assert current_mapping() == parsed({"N": {"cpu": A}})
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        body()
    assert current_mapping() is outside


def test_registering_in_a_scope_ends_with_it():
    register_kernel_mapping({"N": {"cpu": A}})
    with use_kernel_mapping({"M": {"cpu": B}}):
        with use_kernel_mapping({}):
            register_kernel_mapping({"K": {"cpu": C}})
            assert set(current_mapping().layers) == {"N", "M", "K"}
            register_kernel_mapping({"K": {"cpu": C}}, inherit_mapping=False)
            assert set(current_mapping().layers) == {"K"}
        assert set(current_mapping().layers) == {"N", "M"}
    assert set(current_mapping().layers) == {"N"}
    assert set(in_thread(current_mapping).layers) == {"N"}


def test_a_scope_inherits_what_is_registered_when_it_is_entered():
    scope = use_kernel_mapping({"M": {"cpu": B}})
    register_kernel_mapping({"N": {"cpu": A}})
    with scope:
        assert set(current_mapping().layers) == {"N", "M"}


def test_one_object_may_be_entered_again_inside_itself():
    outside = current_mapping()
    scope = use_kernel_mapping({"N": {"cpu": A}})
    with scope:
        register_kernel_mapping({"M": {"cpu": B}})
        with scope:
            register_kernel_mapping({"N": {"cpu": C}})
            assert current_mapping() == parsed({"N": {"cpu": C}, "M": {"cpu": B}})
        assert current_mapping() == parsed({"N": {"cpu": A}, "M": {"cpu": B}})
    assert current_mapping() is outside
    with scope:
        assert current_mapping() == parsed({"N": {"cpu": A}})


def test_as_a_decorator():
    @use_kernel_mapping({"N": {"cpu": A}})
    def depth(n):
        assert current_mapping() == parsed({"N": {"cpu": A}})
        return n and 1 + depth(n - 1)

    assert depth(3) == 3
    assert current_mapping() == KernelMapping()


def test_leaving_a_scope_where_it_was_not_entered():
    scope = use_kernel_mapping({"N": {"cpu": A}})
    with pytest.raises(
        RuntimeError, match=whole("use_kernel_mapping: left in a context where it was not entered")
    ):
        scope.__exit__(None, None, None)
    with scope, use_kernel_mapping({}):
        inside = current_mapping()
        with pytest.raises(RuntimeError, match="where it was not entered"):
            use_kernel_mapping({}).__exit__(None, None, None)
        assert current_mapping() is inside


def test_generators_may_be_closed_in_another_order():
    def scoped(layer):
        with use_kernel_mapping({layer: {"cpu": A}}):
            yield

    first, second = scoped("First"), scoped("Second")
    next(first)
    next(second)
    first.close()
    assert "Second" in current_mapping().layers
    second.close()
    assert current_mapping() == KernelMapping()


def test_tasks_do_not_see_each_others_scopes_but_their_parents():
    async def child(layer, entered, go):
        with use_kernel_mapping({layer: {"cpu": A}}):
            entered.set()
            await go.wait()
            return set(current_mapping().layers)

    async def main():
        with use_kernel_mapping({"Parent": {"cpu": A}}):
            go, entered = asyncio.Event(), [asyncio.Event(), asyncio.Event()]
            tasks = [
                asyncio.create_task(child(layer, event, go))
                for layer, event in zip("XY", entered, strict=True)
            ]
            for event in entered:
                await event.wait()
            assert set(current_mapping().layers) == {"Parent"}
            go.set()
            assert await asyncio.gather(*tasks) == [{"Parent", "X"}, {"Parent", "Y"}]

    asyncio.run(main())


def test_no_registration_is_lost_between_threads():
    threads, each = 8, 40
    start = threading.Barrier(threads)

    def register(n):
        start.wait()
        for i in range(each):
            register_kernel_mapping({f"L{n}-{i}": {"cpu": A}})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=register, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(current_mapping().layers) == threads * each


# -- scopes, against a model ------------------------------------------------------------------


class ThreadActor:
    """A long-lived thread that does what it is told."""

    def __init__(self):
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while (job := self._work.get()) is not None:
            function, result = job
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

    def do(self, function):
        result = Future()
        self._work.put((function, result))
        return result.result(timeout=60)

    def stop(self):
        self._work.put(None)
        self._thread.join()


class TaskActor:
    """A long-lived asyncio task that does what it is told; ``Loop.spawn`` starts one."""

    def __init__(self, loop):
        self._loop = loop
        self._work = asyncio.Queue()
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while (job := await self._work.get()) is not None:
            function, result = job
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

    def do(self, function):
        result = Future()
        self._loop.call_soon_threadsafe(self._work.put_nowait, (function, result))
        return result.result(timeout=60)

    def child(self):
        return self.do(lambda: TaskActor(self._loop))

    def stop(self):
        self._loop.call_soon_threadsafe(self._work.put_nowait, None)


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def spawn(self):
        async def start():
            return TaskActor(self.loop)

        return asyncio.run_coroutine_threadsafe(start(), self.loop).result(timeout=60)

    def stop(self, tasks):
        async def finish():
            await asyncio.gather(*(actor.task for actor in tasks))

        for actor in tasks:
            actor.stop()
        asyncio.run_coroutine_threadsafe(finish(), self.loop).result(timeout=60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def modelled(base, mapping):
    """``view`` of ``mapping`` registered after ``base``, which is a view too."""
    result = {layer: list(entries) for layer, entries in base.items()}
    for layer, devices in mapping.items():
        entries = result.setdefault(layer, [])
        for key, value in devices.items():
            device = Device(key) if isinstance(key, str) else key
            entries[:] = [entry for entry in entries if entry[0] != device]
            entries.append((device, value if isinstance(value, dict) else {Mode.FALLBACK: value}))
    return result


SMALL_MAPPINGS = st.dictionaries(
    st.sampled_from("NM"),
    st.dictionaries(
        st.sampled_from(["cpu", "cuda", cuda(80, 90)]),
        st.one_of(st.sampled_from([A, B, C]), st.just({Mode.TRAINING: A, Mode.FALLBACK: B})),
        max_size=2,
    ),
    max_size=2,
)
ACTORS = st.integers(0, 5)
BROKEN = {"N": {"cpu": C}, "M": {"cpu": 3}}


class Scopes(RuleBasedStateMachine):
    """Threads and tasks that enter, leave and register; each has a stack of views."""

    @initialize()
    def begin(self):
        register_kernel_mapping({}, inherit_mapping=False)
        self.loop = Loop()
        self.actors = [ThreadActor(), ThreadActor(), self.loop.spawn(), self.loop.spawn()]
        self.stacks = [[] for _ in self.actors]
        self.everywhere = {}
        self.contexts = []

    def index(self, actor):
        return actor % len(self.actors)

    def seen(self, actor):
        return self.stacks[actor][-1][1] if self.stacks[actor] else self.everywhere

    @rule(mapping=SMALL_MAPPINGS, inherit=st.booleans())
    def make_context(self, mapping, inherit):
        self.contexts.append((use_kernel_mapping(mapping, inherit), mapping, inherit))

    @precondition(lambda self: self.contexts)
    @rule(actor=ACTORS, data=st.data())
    def enter(self, actor, data):
        actor = self.index(actor)
        context, mapping, inherit = data.draw(st.sampled_from(self.contexts))
        self.actors[actor].do(context.__enter__)
        base = self.seen(actor) if inherit else {}
        self.stacks[actor].append((context, modelled(base, mapping)))

    @precondition(lambda self: any(self.stacks))
    @rule(data=st.data(), error=st.sampled_from([None, ValueError("in the body")]))
    def leave(self, data, error):
        actor = data.draw(st.sampled_from([i for i, stack in enumerate(self.stacks) if stack]))
        context, _ = self.stacks[actor].pop()
        swallowed = self.actors[actor].do(
            lambda: context.__exit__(type(error) if error else None, error, None)
        )
        assert not swallowed

    @rule(actor=ACTORS, mapping=SMALL_MAPPINGS, inherit=st.booleans())
    def register(self, actor, mapping, inherit):
        actor = self.index(actor)
        self.actors[actor].do(lambda: register_kernel_mapping(mapping, inherit))
        merged = modelled(self.seen(actor) if inherit else {}, mapping)
        if self.stacks[actor]:
            context, _ = self.stacks[actor].pop()
            self.stacks[actor].append((context, merged))
        else:
            self.everywhere = merged

    @rule(actor=ACTORS, inherit=st.booleans())
    def fail_to_register(self, actor, inherit):
        for attempt in (register_kernel_mapping, use_kernel_mapping):
            with pytest.raises(TypeError, match="got int"):
                self.actors[self.index(actor)].do(lambda do=attempt: do(BROKEN, inherit))

    @precondition(lambda self: len(self.actors) < 6)
    @rule()
    def start_a_thread(self):
        self.actors.append(ThreadActor())
        self.stacks.append([])

    @precondition(lambda self: len(self.actors) < 6)
    @rule(data=st.data())
    def start_a_task_inside_a_task(self, data):
        tasks = [i for i, actor in enumerate(self.actors) if isinstance(actor, TaskActor)]
        parent = data.draw(st.sampled_from(tasks))
        self.actors.append(self.actors[parent].child())
        self.stacks.append(list(self.stacks[parent]))

    @invariant()
    def everyone_sees_what_the_model_says(self):
        for i, actor in enumerate(self.actors):
            assert view(actor.do(current_mapping)) == self.seen(i)

    def teardown(self):
        self.loop.stop([actor for actor in self.actors if isinstance(actor, TaskActor)])
        for actor in self.actors:
            if isinstance(actor, ThreadActor):
                actor.stop()
        register_kernel_mapping({}, inherit_mapping=False)


TestScopes = Scopes.TestCase
TestScopes.settings = settings(max_examples=40, stateful_step_count=25)


# -- without torch ----------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import kernelgraph.report
from kernelgraph.selection.devices import CUDAProperties, Device, Target, target_of
from kernelgraph.selection.scopes import current_mapping, register_kernel_mapping, select
from kernelgraph.selection.modes import Mode

class Repo:
    def load(self):
        raise AssertionError

register_kernel_mapping({"Norm": {Device("cuda", CUDAProperties(80, 90)): Repo(), "cpu": Repo()}})
print(select(current_mapping(), "Norm", Target("cuda", 86), Mode.INFERENCE).device)
print(select(current_mapping(), "Norm", target_of("cpu"), Mode.TRAINING).device)
print(select(current_mapping(), "Norm", Target("cuda", 91), Mode.INFERENCE).reason.name)
"""


def test_choosing_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["cuda 80-90", "cpu", "NO_CAPABILITY", ""]
