"""Scopes: where and when a mapping is in force."""

import asyncio
import contextlib
import inspect
import queue
import sys
import threading
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernelgraph.selection.devices import Device
from kernelgraph.selection.mapping import KernelMapping
from kernelgraph.selection.modes import Mode
from kernelgraph.selection.scopes import (
    current_mapping,
    register_kernel_mapping,
    use_kernel_mapping,
)
from tests.support.mappings import A, B, C, cuda, parsed, view
from tests.support.messages import whole

# --- by example ---------------------------------------------------------------------------------


def in_thread(function):
    """The result of ``function`` in a new thread."""
    result = Future()
    thread = threading.Thread(target=lambda: result.set_result(function()))
    thread.start()
    thread.join()
    return result.result()


def test_registering_and_scopes_take_the_same_arguments():
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


def test_a_registration_in_a_scope_ends_with_it():
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


def test_a_scope_decorates_a_recursive_function():
    @use_kernel_mapping({"N": {"cpu": A}})
    def depth(n):
        assert current_mapping() == parsed({"N": {"cpu": A}})
        return n and 1 + depth(n - 1)

    assert depth(3) == 3
    assert current_mapping() == KernelMapping()


def test_a_scope_cannot_be_left_where_it_was_not_entered():
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


def test_scopes_of_generators_end_in_any_order():
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


# --- against a model ------------------------------------------------------------------


class ThreadActor:
    """A long-lived thread that runs functions for a test."""

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
    """A long-lived asyncio task that runs functions for a test; ``Loop.spawn`` starts one."""

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
    """The view of ``mapping`` registered after ``base``, which is a view itself."""
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
