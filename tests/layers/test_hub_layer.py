"""Hub layers: which classes of a repository can replace a layer's ``forward``."""

from __future__ import annotations

import inspect
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import Mode, kernelize, last_report, use_kernel_forward_from_hub
from kernelgraph.layers.hub_layer import check_hub_layer, named_forward
from tests.support.toys import Plus10, Scale, Shift, Shift10, only

T = TypeVar("T")


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
    def test_an_object_that_is_no_module_class_is_refused(self, layer: object) -> None:
        with pytest.raises(
            TypeError, match=r"^owner/kernel: a hub layer is a subclass of nn.Module, not "
        ):
            check(layer)

    def test_an_instance_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"is a subclass of nn.Module, not Plus10\(\)"):
            check(Plus10())

    @pytest.mark.parametrize("inherited", [False, True])
    def test_an_init_is_refused(self, inherited: bool) -> None:
        layer = hub_layer(__init__=lambda self: None)
        with pytest.raises(TypeError, match=r"^owner/kernel: hub layer Hub has an __init__; it"):
            check(hub_layer(layer) if inherited else layer)

    def test_other_members_are_refused(self) -> None:
        layer = hub_layer(helper=lambda self: None, eps=1e-6, __call__=lambda self: None)
        message = (
            "^owner/kernel: hub layer Hub has members other than forward, has_backward and "
            "can_torch_compile: __call__, eps, helper$"
        )
        for case in (layer, hub_layer(layer)):
            with pytest.raises(TypeError, match=message):
                check(case)

    def test_members_of_a_mixin_are_refused(self) -> None:
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
    def test_another_number_or_kind_of_parameters_is_refused(self, forward: Any) -> None:
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

    def test_another_default_is_refused(self) -> None:
        def reference(self, x, eps=1e-6, *, dim=-1): ...  # type: ignore[no-untyped-def]

        for forward, words in [
            (lambda self, x, eps=1e-5, *, dim=-1: None, r"eps=1e-05, .* eps=1e-06"),
            (lambda self, x, eps=1e-6, *, axis=1: None, r"axis=1, .* dim=-1"),
            (lambda self, x, eps=None, *, dim=-1: None, r"eps=None, .* eps=1e-06"),
        ]:
            with pytest.raises(TypeError, match=rf"^owner/kernel: .* has the default {words}"):
                check(hub_layer(forward=forward), reference)
        check(hub_layer(forward=lambda self, x, eps=1e-6, *, dim=-1: None), reference)
        check(hub_layer(forward=lambda self, x, eps, *, dim: None), reference)

    def test_every_kind_that_is_alike_fits(self) -> None:
        def reference(self, a, /, b, *c, d, **e): ...  # type: ignore[no-untyped-def]

        def forward(self, p, /, q=1, *r, s=2, **t): ...  # type: ignore[no-untyped-def]

        with pytest.raises(TypeError, match=r"differ in number or kind"):
            check(hub_layer(forward=lambda self, a, b, *c, d, **e: None), reference)
        check(hub_layer(forward=forward), reference)

    def test_a_layer_without_forward_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"differ in number or kind"):
            check(type("Hub", (nn.Module,), {}))


class TestNames:
    def test_a_forward_with_the_names_of_the_reference_is_called_as_it_is(self) -> None:
        assert named_forward(Plus10.forward, Scale.forward) is Plus10.forward

    def test_arguments_are_passed_under_other_names(self) -> None:
        default = [3]

        def reference(self, a, /, b, c=default, *more, dim=-1, **others): ...  # type: ignore[no-untyped-def]

        def forward(this, p, /, q, r, *s, axis, **t):  # type: ignore[no-untyped-def]
            return this, p, q, r, s, axis, t

        made: Any = named_forward(forward, reference)
        assert made is named_forward(forward, reference)
        assert made(0, 1, 2) == (0, 1, 2, [3], (), -1, {})
        assert made(0, 1, 2)[3] is default
        assert made(0, 1, b=2, dim=4) == (0, 1, 2, [3], (), 4, {})
        assert made(0, 1, 2, 5, 6, x=7) == (0, 1, 2, 5, (6,), -1, {"x": 7})
        assert inspect.signature(made) == inspect.signature(reference)
        with pytest.raises(TypeError, match="b"):
            made(0, 1, q=2)

    @pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING], ids=str)
    @pytest.mark.parametrize("compiles", [False, True])
    def test_a_kernel_is_called_under_the_names_of_its_layer(
        self, mode: Mode, compiles: bool
    ) -> None:
        @use_kernel_forward_from_hub("Named")
        class Named(nn.Module):
            def forward(self, x: Tensor, by: Tensor, scale: float = 2.0) -> Tensor:
                return x * scale + by

        class Other(nn.Module):
            def forward(self, states: Tensor, residual: Tensor, factor: float) -> Tensor:
                return states * factor + residual

        layer = Named()
        with only(Named=Other):
            kernelize(layer, mode=mode | Mode.TORCH_COMPILE if compiles else mode, device="cpu")
        called = torch.compile(layer, backend="eager", fullgraph=True) if compiles else layer
        for _ in range(2):
            x, y = torch.randn(3, requires_grad=True), torch.randn(3)
            with torch.set_grad_enabled(mode is Mode.TRAINING):
                torch.testing.assert_close(called(x, by=y), x * 2 + y)
                torch.testing.assert_close(called(by=y, x=x, scale=3.0), x * 3 + y)
                torch.testing.assert_close(called(x, y, 3.0), x * 3 + y)
        assert last_report().kernels


def test_the_toys_of_other_tests_fit() -> None:
    check(Plus10, Scale.forward)
    check(Shift10, Shift.forward)
