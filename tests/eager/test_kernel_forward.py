"""Copies and pickles of kernelized models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelgraph import (
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
)
from kernelgraph.eager.kernelization import KernelForward
from tests.support.toys import (
    Plain,
    Plus10,
    Plus20,
    Scale,
    Shift10,
    ToyRepository,
    forwards,
    kernelized,
    only,
    result,
)

INFERENCE, TRAINING = Mode.INFERENCE, Mode.TRAINING


TOY = ToyRepository(Plus10)


# --- copies --------------------------------------------------------------------------------------


class TestCopy:
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_deep_copy_runs_the_kernel_on_its_own_weights(self, nested: bool) -> None:
        original: Any = nn.Sequential(kernelized(Scale=Plus10)) if nested else kernelized(Scale=TOY)
        twin = copy.deepcopy(original)
        with torch.no_grad():
            next(twin.parameters()).fill_(3)
            assert (result(original), result(twin)) == (12, 13)
            next(original.parameters()).fill_(4)
            assert (result(original), result(twin)) == (14, 13)

    def test_a_deep_copy_of_a_copy_is_kernelized_anew_alone(self) -> None:
        original = kernelized(Scale=Plus10)
        twin = copy.deepcopy(copy.deepcopy(original))
        with only(Scale=Plus20):
            kernelize(twin, mode=INFERENCE)
        assert (result(original), result(twin)) == (12, 22)

    def test_a_deep_copy_loads_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = kernelized(Scale=Flaky(Plus10))
        monkeypatch.setattr(Flaky, "broken", True)
        assert result(copy.deepcopy(original)) == 12

    def test_a_deep_copy_of_the_forward_copies_its_layer(self) -> None:
        forward = copy.deepcopy(kernelized(Scale=Plus10).forward)
        assert isinstance(forward, KernelForward)
        assert vars(forward.args[0])["forward"] is not None
        assert result(forward) == 12

    def test_a_shallow_copy_runs_on_the_original_until_it_is_kernelized(self) -> None:
        original = kernelized(Scale=Plus10)
        shallow = copy.copy(original)
        shallow.__dict__["_parameters"] = {"weight": nn.Parameter(torch.tensor(7.0))}
        assert result(shallow) == 12
        with only(Scale=Plus10):
            kernelize(shallow, mode=INFERENCE)
        assert (result(original), result(shallow)) == (12, 17)


# --- pickles -------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Untagged(nn.Module):
    """Made extensible by a test, and pickled with its kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


class Flaky(ToyRepository):
    """A repository that a test can break."""

    broken = False

    def load(self) -> Any:
        if Flaky.broken:
            raise OSError("out of reach")
        return super().load()


class TestPickle:
    @pytest.mark.parametrize("through", [through_pickle, through_torch])
    def test_an_unpickled_layer_runs_the_kernel_on_its_own_weights(self, through: Any) -> None:
        original = nn.Sequential(kernelized(Scale=Plus10), Plain())
        with only(Scale=Plus20):  # the mapping where it is unpickled does not matter
            loaded = through(original)
        assert result(loaded) == 12
        with torch.no_grad():
            loaded[0].weight.fill_(3)
        assert (result(original), result(loaded)) == (12, 13)
        assert list(loaded.state_dict()) == ["0.weight"]
        loaded.load_state_dict(original.state_dict())
        assert result(loaded) == 12
        assert result(through(copy.deepcopy(loaded))) == 12

    def test_unpickling_loads_each_kernel_once(self) -> None:
        repository = ToyRepository(Plus10)
        with only(Scale=repository):
            model = kernelize(nn.Sequential(*(Scale() for _ in range(5))), mode=INFERENCE)
        loaded = through_pickle(model)
        (seen,) = {id(m.forward.recipe.selection.repository): m.forward for m in loaded}.values()
        # One load before pickling, which was pickled with the toy, and one after.
        assert len(seen.recipe.selection.repository.loads) == 2

    def test_the_forward_itself_can_be_pickled(self) -> None:
        forward = pickle.loads(pickle.dumps(kernelized(Scale=Plus10).forward))
        assert result(forward) == 12

    def test_an_unpickled_model_is_decided_anew(self) -> None:
        loaded = through_pickle(kernelized(Scale=Plus10))
        with only(Scale=Plus20):
            assert result(kernelize(loaded, mode=INFERENCE)) == 22
        with only():
            assert result(kernelize(loaded, mode=INFERENCE)) == 2
        assert forwards(loaded) == {}

    def test_unpickled_layers_run_their_reference_where_the_kernel_cannot_be_loaded(
        self, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
    ) -> None:
        with only(Scale=Flaky(Plus10)):
            model = kernelize(nn.Sequential(Scale(2.0), Scale(3.0)), mode=INFERENCE)
        saved = pickle.dumps(model)
        monkeypatch.setattr(Flaky, "broken", True)
        loaded = pickle.loads(saved)
        assert [result(layer) for layer in loaded] == [2, 3]
        assert warnings() == ["unpickled layers Scale run their reference: OSError: out of reach"]
        # Nothing is lost: the kernel is back once it can be loaded again.
        again = pickle.dumps(loaded)
        monkeypatch.setattr(Flaky, "broken", False)
        assert [result(layer) for layer in pickle.loads(again)] == [12, 13]
        with only(Scale=Plus20):
            kernelize(loaded, mode=INFERENCE)
        assert [result(layer) for layer in loaded] == [22, 23]

    def test_unpickled_layers_run_their_reference_where_kernels_are_disabled(
        self, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
    ) -> None:
        saved = pickle.dumps(kernelized(Scale=Plus10))
        monkeypatch.setenv("DISABLE_KERNEL_MAPPING", "1")
        assert result(pickle.loads(saved)) == 2
        assert warnings() == [
            "unpickled layers Scale run their reference: DISABLE_KERNEL_MAPPING is set"
        ]

    def test_unpickled_layers_run_their_reference_where_the_class_is_not_extensible(
        self, warnings: Callable[[], list[str]]
    ) -> None:
        replace_kernel_forward_from_hub(Untagged, "Shift")
        try:
            with only(Shift=Shift10):
                saved = pickle.dumps(kernelize(Untagged(), mode=INFERENCE, device="cpu"))
            assert result(pickle.loads(saved)) == 11
        finally:
            del Untagged.kernel_layer_name
        assert result(pickle.loads(saved)) == 1
        assert warnings() == [
            "unpickled layers Untagged run their reference: "
            "TypeError: the class is not extensible in this process"
        ]
