"""Decorators: what becomes of classes, and what they refuse."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
from torch import Tensor, nn

from kernelgraph import replace_kernel_forward_from_hub, use_kernel_forward_from_hub
from kernelgraph.layers.tags import extensible, reference_of
from tests.support.toys import Plain, Scale, result


class TestDecoratedClass:
    def test_is_the_class_itself(self) -> None:
        class Layer(nn.Module):
            def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
                """The author's words."""
                return 2 * x if twice else x

        forward, members = Layer.forward, set(vars(Layer))
        assert use_kernel_forward_from_hub("Layer")(Layer) is Layer
        assert reference_of(Layer) is forward  # which the backend wraps where it is in use
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


def test_a_class_of_another_package_becomes_extensible() -> None:
    class Foreign(Plain):
        pass

    def wanted(module: nn.Module) -> bool:
        return not module.training

    assert replace_kernel_forward_from_hub(Foreign, "Foreign", wanted) is None
    layer = extensible(Foreign)
    assert layer is not None
    assert (layer.layer_name, layer.condition) == ("Foreign", wanted)
    assert Foreign().kernel_condition is wanted  # not bound to the instance
    assert extensible(Plain) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "layer_name is a non-empty string, not 3"),
        (("",), "layer_name is a non-empty string, not ''"),
        (("Name", 3), "condition is a callable or None, not 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        use_kernel_forward_from_hub(*arguments)
    with pytest.raises(TypeError, match=f"^{message}$"):
        replace_kernel_forward_from_hub(Plain, *arguments)
    with pytest.raises(TypeError, match=r"fake is a callable or None, not 3"):
        use_kernel_forward_from_hub("Name", fake=3)


def test_the_decorator_without_its_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layer_name is a non-empty string, not <class"):

        @use_kernel_forward_from_hub
        class Layer(nn.Module):
            pass


def test_other_objects_cannot_become_extensible() -> None:
    with pytest.raises(TypeError, match=r"an extensible layer is an nn.Module class, not <class"):
        use_kernel_forward_from_hub("Name")(int)
    with pytest.raises(TypeError, match=r"decorates an nn.Module class or a function, not Plain\("):
        use_kernel_forward_from_hub("Name")(Plain())
    with pytest.raises(TypeError, match=r"an extensible layer is an nn.Module class, not Plain"):
        replace_kernel_forward_from_hub(Plain(), "Name")
