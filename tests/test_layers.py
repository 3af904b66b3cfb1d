from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import (
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
    use_kernelized_func,
)
from kernelgraph.layers import (
    check_hub_layer,
    extensible,
    on_extensible,
    reference_of,
    tagged_subclasses,
)
from tests.support.toys import Plain, Plus10, Scale, Shift, Shift10, only, result

T = TypeVar("T")


def name_of(cls: type) -> str | None:
    layer = extensible(cls)
    return layer and layer.layer_name


# --- classes -------------------------------------------------------------------------------------


class TestDecoratedClass:
    def test_is_the_class_itself(self) -> None:
        class Layer(nn.Module):
            def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
                """The author's words."""
                return 2 * x if twice else x

        forward, members = Layer.forward, set(vars(Layer))
        assert use_kernel_forward_from_hub("Layer")(Layer) is Layer
        assert reference_of(Layer) is forward  # a backend of ours wraps it, where one is in use
        assert str(inspect.signature(Layer.forward)) == (
            "(self, x: 'Tensor', *, twice: 'bool' = False) -> 'Tensor'"
        )
        assert set(vars(Layer)) - members == {
            "kernel_layer_name",
            "kernel_condition",
            "kernel_fake",
        }

    def test_behaves_as_before(self) -> None:
        layer = Scale(3.0)
        assert result(layer) == 3
        assert list(layer.state_dict()) == ["weight"]
        assert result(pickle.loads(pickle.dumps(layer))) == 3
        assert result(copy.deepcopy(layer)) == 3
        assert "forward" not in vars(layer)

    def test_can_be_subclassed(self) -> None:
        class Twice(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        assert result(Twice(3.0)) == 6

    def test_carries_the_name_where_others_look_for_it(self) -> None:
        assert Scale.kernel_layer_name == "Scale"
        assert Scale().kernel_layer_name == "Scale"


class TestSubclass:
    def test_that_inherits_forward_is_extensible_under_the_inherited_name(self) -> None:
        class Inherits(Scale):
            pass

        layer = extensible(Inherits)
        assert layer is not None
        assert (layer.layer_name, layer.owner) == ("Scale", Scale)
        assert layer.reference is reference_of(Scale)

    def test_with_a_forward_of_its_own_is_not(self) -> None:
        class Overrides(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Below(Overrides):
            pass

        assert name_of(Overrides) is None
        assert name_of(Below) is None

    def test_with_a_forward_and_a_tag_of_its_own_has_its_own_name(self) -> None:
        @use_kernel_forward_from_hub("Other")
        class Tagged(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return x

        layer = extensible(Tagged)
        assert layer is not None
        assert (layer.layer_name, layer.owner) == ("Other", Tagged)
        assert name_of(Scale) == "Scale"

    def test_tagged_itself_has_its_own_name_for_the_inherited_forward(self) -> None:
        @use_kernel_forward_from_hub("Other", condition=lambda module: False)
        class Tagged(Scale):
            pass

        layer = extensible(Tagged)
        assert layer is not None
        assert (layer.layer_name, layer.reference) == ("Other", reference_of(Scale))
        assert layer.condition is not None
        assert extensible(Scale).condition is None

    def test_opts_out_with_none(self) -> None:
        class OptsOut(Scale):
            kernel_layer_name = None

        assert name_of(OptsOut) is None

    def test_a_mixin_without_forward_changes_nothing(self) -> None:
        class Mixin:
            def extra(self) -> int:
                return 1

        class Before(Mixin, Scale):
            pass

        class After(Scale, Mixin):
            pass

        assert name_of(Before) == name_of(After) == "Scale"

    def test_a_mixin_with_forward_counts_where_it_comes_first(self) -> None:
        class Mixin:
            def forward(self, x: Tensor) -> Tensor:
                return x

        class Before(Mixin, Scale):
            pass

        class After(Scale, Mixin):
            pass

        assert name_of(Before) is None
        assert name_of(After) == "Scale"

    @pytest.mark.parametrize("base", [object, nn.Module])
    def test_a_mixin_that_is_only_a_tag_tags_the_forward_beside_it(self, base: type) -> None:
        class Tag(base):
            kernel_layer_name = "Tagged"

        class Layer(Tag, Plain):
            pass

        layer = extensible(Layer)
        assert layer is not None
        assert (layer.layer_name, layer.owner) == ("Tagged", Layer)
        assert layer.reference is Plain.forward
        assert name_of(Tag) is None  # it has no forward to replace
        assert Layer in tagged_subclasses()
        assert Tag not in tagged_subclasses()

    @pytest.mark.parametrize("base", [object, nn.Module])
    def test_a_tag_without_a_forward_is_not_for_a_forward_of_its_own(self, base: type) -> None:
        class Tag(base):
            kernel_layer_name = "Tagged"

        class Layer(Tag, Plain):
            def forward(self, x: Tensor) -> Tensor:
                return -x

        assert name_of(Layer) is None

    def test_a_name_does_not_reach_the_forward_of_another_base(self) -> None:
        class Named(Plain):
            kernel_layer_name = "Named"

        class Overrides(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return -x

        class Both(Named, Overrides):
            pass

        assert name_of(Named) == "Named"
        assert Both.forward is Overrides.forward
        assert name_of(Both) is None


class TestForeignTag:
    def test_a_bare_attribute_counts(self) -> None:
        class Bare(Plain):
            kernel_layer_name = "Bare"

        assert name_of(Bare) == "Bare"
        assert Bare in tagged_subclasses()
        assert type("Below", (Bare,), {}) not in tagged_subclasses()

    @pytest.mark.parametrize("wrap", [staticmethod, lambda f: f])
    def test_a_bare_condition_counts(self, wrap: Callable[[Any], Any]) -> None:
        class Bare(nn.Module):
            kernel_layer_name = "Scale"

            def __init__(self, wanted: bool) -> None:
                super().__init__()
                self.wanted = wanted
                self.weight = nn.Parameter(torch.ones(()))

            def forward(self, x: Tensor) -> Tensor:
                return x

        Bare.kernel_condition = wrap(lambda module: module.wanted)
        model = nn.ModuleList([Bare(True), Bare(False)])
        with only(Scale=Plus10):
            kernelize(model, mode=Mode.INFERENCE)
        assert [result(layer) for layer in model] == [11, 1]

    @pytest.mark.parametrize("value", [None, "", 3, property(lambda self: "Bare")])
    def test_what_is_no_name_does_not_count(self, value: object) -> None:
        class Bare(Plain):
            kernel_layer_name = value

        assert name_of(Bare) is None


def test_a_class_one_does_not_own() -> None:
    class Foreign(Plain):
        pass

    def wanted(module: nn.Module) -> bool:
        return not module.training

    assert replace_kernel_forward_from_hub(Foreign, "Foreign", wanted) is None
    layer = extensible(Foreign)
    assert layer is not None
    assert (layer.layer_name, layer.condition) == ("Foreign", wanted)
    assert Foreign().kernel_condition is wanted  # not bound to the instance
    assert name_of(Plain) is None


class TestConditionThatIsNone:
    """A condition counts unless its code alone says that it refuses no instance."""

    @staticmethod
    def counts(condition: Any) -> bool:
        class Tagged(Plain):
            pass

        replace_kernel_forward_from_hub(Tagged, "Tagged", condition)
        layer = extensible(Tagged)
        assert layer is not None
        return layer.condition is not None

    def test_one_that_returns_a_true_constant_is_none(self) -> None:
        def documented(module: nn.Module) -> bool:
            """Every one of them."""
            return True

        def a_name(module: nn.Module) -> str:
            return "true too"

        for condition in (lambda module: True, documented, a_name):
            assert not self.counts(condition)

    def test_any_other_counts(self) -> None:
        yes = True

        def refuses(module: nn.Module) -> bool:
            return False

        def returns_nothing(module: nn.Module) -> None:
            pass

        def generator(module: nn.Module) -> Iterator[None]:
            return True
            yield

        async def coroutine(module: nn.Module) -> bool:
            return True

        class Callable_:  # noqa: N801
            def __call__(self, module: nn.Module) -> bool:
                return True

            def method(self, module: nn.Module) -> bool:
                return True

        for condition in (
            refuses,
            returns_nothing,
            generator,
            coroutine,
            Callable_(),
            Callable_().method,
            functools.partial(lambda module, wanted: True, wanted=1),
            lambda module: yes,
            lambda module: pytest,
            lambda module: module,
            lambda module, wanted=True: wanted,
            lambda module: True if module.training else False,  # noqa: SIM210
        ):
            assert self.counts(condition), condition


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "layer_name is a non-empty string, not 3"),
        (("",), "layer_name is a non-empty string, not ''"),
        (("Name", 3), "condition is a callable or None, not 3"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        use_kernel_forward_from_hub(*arguments)
    with pytest.raises(TypeError, match=f"^{message}$"):
        replace_kernel_forward_from_hub(Plain, *arguments)
    with pytest.raises(TypeError, match=r"fake is a callable or None, not 3"):
        use_kernel_forward_from_hub("Name", fake=3)


def test_the_decorator_without_its_call() -> None:
    with pytest.raises(TypeError, match=r"layer_name is a non-empty string, not <class"):

        @use_kernel_forward_from_hub
        class Layer(nn.Module):
            pass


def test_what_cannot_be_extensible() -> None:
    with pytest.raises(TypeError, match=r"an extensible layer is an nn.Module class, not <class"):
        use_kernel_forward_from_hub("Name")(int)
    with pytest.raises(TypeError, match=r"decorates an nn.Module class or a function, not Plain\("):
        use_kernel_forward_from_hub("Name")(Plain())
    with pytest.raises(TypeError, match=r"an extensible layer is an nn.Module class, not Plain"):
        replace_kernel_forward_from_hub(Plain(), "Name")


def test_listeners_hear_of_classes_tagged_before_and_after() -> None:
    heard: list[type] = []
    on_extensible(heard.append)
    assert Scale in heard

    @use_kernel_forward_from_hub("Later")
    class Later(Plain):
        pass

    assert heard[-1] is Later
    assert len(heard) == len(set(heard))


# --- functions -----------------------------------------------------------------------------------


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
        (lambda x, /, y=1: x, "def forward(self, x, /, y=1): return x + 10"),
        (lambda x, *, y=1: x, "def forward(self, x, *, y=1): return x + 10"),
        (lambda *x, **y: x[0], "def forward(self, *x, **y): return x[0] + 10"),
        (lambda self: self, "def forward(self, x): return x + 10"),
    ],
)
def test_functions_with_every_kind_of_parameter(function: Any, kernel: str) -> None:
    layer = use_kernel_forward_from_hub("anything")(function)
    assert result(layer) == 1
    namespace: dict[str, Any] = {}
    exec(kernel, namespace)
    with only(anything=type("Kernel", (nn.Module,), {"forward": namespace["forward"]})):
        kernelize(nn.Sequential(layer), mode=Mode.INFERENCE, device="cpu")
    assert result(layer) == 11


def test_wrong_uses_of_use_kernelized_func() -> None:
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
    from kernelgraph import last_report

    return lambda: [decision.path for decision in last_report().decisions]


# --- whether a hub layer fits --------------------------------------------------------------------


def check(layer: Any, reference: Any = Scale.forward) -> None:
    check_hub_layer(layer, reference, "owner/kernel")


def hub_layer(*bases: type, **members: Any) -> type:
    members.setdefault("forward", Plus10.forward)
    return type("Hub", bases or (nn.Module,), members)


class TestPurity:
    def test_flags_annotations_and_docstrings_are_no_members(self) -> None:
        class Hub(nn.Module, Generic[T]):
            """Words."""

            weight: Tensor
            eps: float
            has_backward = False
            can_torch_compile = True

            def forward(self, x: Tensor) -> Tensor:
                return x

        class Inherits(Hub):
            pass

        check(Hub)
        check(Inherits)

    @pytest.mark.parametrize("layer", [3, int, Plus10.forward, None])
    def test_what_is_no_module_class(self, layer: object) -> None:
        with pytest.raises(
            TypeError, match=r"^owner/kernel: a hub layer is a subclass of nn.Module, not "
        ):
            check(layer)

    def test_an_instance_is_no_class(self) -> None:
        with pytest.raises(TypeError, match=r"is a subclass of nn.Module, not Plus10\(\)"):
            check(Plus10())

    @pytest.mark.parametrize("inherited", [False, True])
    def test_an_init(self, inherited: bool) -> None:
        layer = hub_layer(__init__=lambda self: None)
        with pytest.raises(TypeError, match=r"^owner/kernel: hub layer Hub has an __init__; it"):
            check(hub_layer(layer) if inherited else layer)

    def test_other_members(self) -> None:
        layer = hub_layer(helper=lambda self: None, eps=1e-6, __call__=lambda self: None)
        message = (
            "^owner/kernel: hub layer Hub has members other than forward, has_backward and "
            "can_torch_compile: __call__, eps, helper$"
        )
        for case in (layer, hub_layer(layer)):
            with pytest.raises(TypeError, match=message):
                check(case)

    def test_members_of_a_mixin(self) -> None:
        mixin = type("Mixin", (), {"helper": 1})
        for bases in ((nn.Module, mixin), (mixin, nn.Module)):
            with pytest.raises(TypeError, match=r"has members other than .*: helper$"):
                check(hub_layer(*bases))


class TestSignature:
    @pytest.mark.parametrize(
        "forward",
        [
            lambda self: None,
            lambda self, x, y: None,
            lambda self, x, y=1: None,
            lambda self, *x: None,
            lambda self, *, x: None,
            lambda self, x, **y: None,
            lambda self, x, /: None,
            staticmethod(lambda x: None),
        ],
    )
    def test_another_number_or_kind_of_parameters(self, forward: Any) -> None:
        layer = hub_layer(forward=forward)
        taken = str(inspect.signature(layer.forward))
        with pytest.raises(TypeError) as error:
            check(layer)
        assert str(error.value) == (
            f"owner/kernel: forward of hub layer Hub takes {taken}, and the layer that it would "
            f"replace takes {inspect.signature(Scale.forward)}: the parameters differ in number "
            "or kind"
        )

    def test_names_defaults_and_annotations_may_differ(self) -> None:
        check(hub_layer(forward=lambda this, y=None: None))

    def test_every_kind_that_is_alike_fits(self) -> None:
        def reference(self, a, /, b, *c, d, **e): ...  # type: ignore[no-untyped-def]

        def forward(self, p, /, q=1, *r, s=2, **t): ...  # type: ignore[no-untyped-def]

        with pytest.raises(TypeError, match=r"differ in number or kind"):
            check(hub_layer(forward=lambda self, a, b, *c, d, **e: None), reference)
        check(hub_layer(forward=forward), reference)

    def test_no_forward_at_all(self) -> None:
        with pytest.raises(TypeError, match=r"differ in number or kind"):
            check(type("Hub", (nn.Module,), {}))


def test_toys_fit() -> None:
    check(Plus10, Scale.forward)
    check(Shift10, Shift.forward)
