"""Tags: which classes are extensible, and under which name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import (
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_forward_from_hub,
)
from kernelgraph.layers.tags import extensible, on_extensible, reference_of, tagged_subclasses
from tests.support.toys import Plain, Plus10, Scale, only, result


def name_of(cls: type) -> str | None:
    """The name under which ``cls`` is extensible."""
    layer = extensible(cls)
    return layer and layer.layer_name


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
                return x * 1

        Bare.kernel_condition = wrap(lambda module: module.wanted)
        model = nn.ModuleList([Bare(True), Bare(False)])
        with only(Scale=Plus10):
            kernelize(model, mode=Mode.INFERENCE)
        assert [result(layer) for layer in model] == [11, 1]

    @pytest.mark.parametrize("value", [None, "", 3, property(lambda self: "Bare")])
    def test_an_attribute_that_is_no_name_does_not_count(self, value: object) -> None:
        class Bare(Plain):
            kernel_layer_name = value

        assert name_of(Bare) is None


class TestCondition:
    """A condition counts unless the ``kernels`` package made it for a class without one."""

    @staticmethod
    def counts(condition: Any) -> bool:
        class Tagged(Plain):
            pass

        replace_kernel_forward_from_hub(Tagged, "Tagged", condition)
        layer = extensible(Tagged)
        assert layer is not None
        return layer.condition is not None

    def test_default_of_the_kernels_package_does_not_count(self, theirs: Any) -> None:
        @theirs.use_kernel_forward_from_hub("Tagged")
        class Tagged(Plain):
            pass

        layer = extensible(Tagged)
        assert layer is not None
        assert layer.condition is None

    def test_condition_of_the_user_counts(self) -> None:
        def refuses(module: nn.Module) -> bool:
            return False

        class Callable_:  # noqa: N801
            def __call__(self, module: nn.Module) -> bool:
                return True

            def method(self, module: nn.Module) -> bool:
                return True

        for condition in (
            refuses,
            Callable_(),
            Callable_().method,
            functools.partial(lambda module, wanted: True, wanted=1),
            lambda module: module.training,
            lambda module: True,
        ):
            assert self.counts(condition), condition


def test_listeners_hear_of_classes_tagged_before_and_after() -> None:
    heard: list[type] = []
    on_extensible(heard.append)
    assert Scale in heard

    @use_kernel_forward_from_hub("Later")
    class Later(Plain):
        pass

    assert heard[-1] is Later
    assert len(heard) == len(set(heard))
