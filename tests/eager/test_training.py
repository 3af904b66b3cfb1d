"""Eager training: whatever the gradient of a kernel is, the model trains on the reference's."""

from __future__ import annotations

import copy
import gc
import re
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.training_kernels import (
    KERNELS,
    WIDTH,
    Correct,
    Detached,
    Gate,
    HidesSaves,
    Loss,
    Numpy,
    OverwritesPrivate,
    Plain,
    assert_trains_like_the_reference,
    by_name,
    gradients,
    inputs,
    kernel_of,
    kernelized,
    square,
)

# --- gradients -----------------------------------------------------------------------------------


@by_name("kernel", KERNELS)
class TestGradients:
    def test_gradients_are_the_references(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs())

    def test_gradients_for_expanded_incoming_gradients(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), loss=torch.sum)

    def test_gradients_of_inputs_that_are_not_contiguous(self, kernel: Any) -> None:
        x = torch.randn(WIDTH, 3, requires_grad=True)
        assert_trains_like_the_reference(kernel, x.t(), torch.randn(3, WIDTH), loss=square)
        assert_trains_like_the_reference(kernel, x[:, ::2].t(), torch.randn(2, WIDTH))

    def test_gradients_of_broadcast_inputs(self, kernel: Any) -> None:
        x, _ = inputs(2, 3, WIDTH)
        for shape in [(WIDTH,), (1, WIDTH), (3, 1), ()]:
            assert_trains_like_the_reference(kernel, x, torch.randn(shape, requires_grad=True))

    def test_gradients_of_some_inputs_only(self, kernel: Any) -> None:
        layer, reference = kernelized(kernel), Gate()
        x, y = inputs()
        for wanted in [(True, False, False), (False, True, False), (False, False, True)]:
            for one in (layer, reference):
                one.weight.requires_grad_(wanted[0])
            x.requires_grad_(wanted[1])
            y.requires_grad_(wanted[2])
            torch.testing.assert_close(gradients(layer, x, y), gradients(reference, x, y))

    def test_gradients_accumulate(self, kernel: Any) -> None:
        layer, reference = kernelized(kernel), Gate()
        for _ in range(3):
            x, y = inputs()
            for one in (layer, reference):
                one(x, y).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad)

    def test_gradients_of_a_retained_graph(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        wanted = gradients(Gate(), x, y)
        loss = square(layer(x, y))
        for _ in range(2):
            made = torch.autograd.grad(loss, [x, y, layer.weight], retain_graph=True)
            torch.testing.assert_close(list(made), wanted)

    def test_gradients_where_another_node_reads_the_same_incoming_gradient(
        self, kernel: Any
    ) -> None:
        def twice(output: Tensor) -> Tensor:
            return (output + y * 3).sum()

        x, y = inputs()
        assert_trains_like_the_reference(kernel, x, y, twice)

    def test_inputs_are_not_changed(self, kernel: Any) -> None:
        x, y = inputs()
        before = x.detach().clone(), y.detach().clone()
        layer = kernelized(kernel)
        weight = layer.weight.detach().clone()
        for _ in range(2):
            gradients(layer, x, y)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])
        assert torch.equal(layer.weight, weight)

    def test_gradients_within_activation_checkpointing(self, kernel: Any) -> None:
        for reentrant in (False, True):
            layer, (x, y) = kernelized(kernel), inputs()

            def run(x: Tensor, y: Tensor, layer: Any = layer, reentrant: bool = reentrant) -> Any:
                return checkpoint(layer, x, y, use_reentrant=reentrant)

            for _ in range(2):
                made = torch.autograd.grad(square(run(x, y)), [x, y]) if not reentrant else None
                x.grad = y.grad = None
                square(run(x, y)).backward()
                wanted = gradients(Gate(), x, y)[:2]
                torch.testing.assert_close([x.grad, y.grad], wanted)
                if made is not None:
                    torch.testing.assert_close(list(made), wanted)

    def test_gradients_in_an_autocast_region(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        gradients(layer, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            made, wanted = gradients(layer, x, y), gradients(Gate(), x, y)
        torch.testing.assert_close(made, wanted)

    def test_gradients_in_low_precision(self, kernel: Any) -> None:
        if kernel is Numpy:
            pytest.skip("numpy has no bfloat16")
        layer, reference = (made.bfloat16() for made in (kernelized(kernel), Gate()))
        x, y = (v.detach().bfloat16().requires_grad_() for v in inputs())
        made, wanted = gradients(layer, x, y), gradients(reference, x, y)
        torch.testing.assert_close(made, wanted, rtol=0.05, atol=0.05)

    def test_gradients_with_wrong_gradient_reference(self, kernel: Any) -> None:
        assert_trains_like_the_reference(kernel, *inputs(), wrong_gradient="reference")

    def test_gradients_after_an_in_place_write_into_an_input_or_the_output(
        self, kernel: Any
    ) -> None:
        layer, reference = kernelized(kernel), Gate()

        def found(one: nn.Module, x: Tensor, y: Tensor, *, output: bool) -> Any:
            used = x * 1
            made = one(used, y)
            (made if output else used).mul_(2)
            return list(torch.autograd.grad(square(made), [x, y, *one.parameters()]))

        for output in (True, False, True, False):
            x, y = inputs()
            wanted = found(reference, x, y, output=output)
            try:
                made = found(layer, x, y, output=output)
            except RuntimeError as error:  # autograd refuses a changed saved tensor
                if not re.search(r"in-?place operation", str(error)) or output:
                    raise
            else:
                torch.testing.assert_close(made, wanted)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two inputs: one may be transposed, expanded or sliced, and the other broadcast."""
    sizes = [*draw(st.lists(st.integers(1, 3), max_size=2)), WIDTH]
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
    x = torch.randn([n * 2 for n in sizes])[tuple(slice(0, n) for n in sizes)]
    if layout == "plain":
        x = torch.randn(sizes)
    elif layout == "transposed":
        x = torch.randn(sizes[::-1]).permute(*reversed(range(len(sizes))))
    elif layout == "expanded":
        x = torch.randn([1] * len(sizes)).expand(sizes)
    cut = draw(st.integers(0, len(sizes)))
    other = [draw(st.sampled_from([n, 1])) for n in sizes[cut:]]
    y = torch.randn(other)
    return x.requires_grad_(draw(st.booleans())), y.requires_grad_(draw(st.booleans()))


@settings(max_examples=60)
@given(
    st.sampled_from(KERNELS),
    arguments(),
    st.booleans(),
    st.sampled_from([torch.sum, square, lambda output: output.mean(0).sum()]),
    st.sampled_from(["recompute", "reference"]),
)
def test_training_uses_the_references_gradient_whatever_the_kernels_is(
    kernel: Any, given: tuple[Tensor, Tensor], frozen: bool, loss: Loss, wrong: str
) -> None:
    x, y = given
    layer, reference = kernelized(kernel, wrong_gradient=wrong), Gate()
    for one in (layer, reference):
        one.weight.requires_grad_(not frozen)
    for _ in range(2):
        output, wanted = layer(x, y), reference(x, y)
        torch.testing.assert_close(output, wanted)
        assert output.requires_grad == wanted.requires_grad
        if wanted.requires_grad:
            torch.testing.assert_close(
                gradients(layer, x, y, loss), gradients(reference, x, y, loss)
            )


# --- everything else -----------------------------------------------------------------------------


class TestKernelizedForTraining:
    @by_name("kernel", [kernel_of(HidesSaves), Plain, Detached])
    def test_a_kernelized_layer_compiles_with_any_backend(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        gradients(layer, x, y)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, y), Gate()(x, y))

    @by_name("kernel", [kernel_of(Correct), Detached])
    def test_hooks_run_in_forward_and_backward(self, kernel: Any) -> None:
        layer, (x, y) = kernelized(kernel), inputs()
        seen: list[str] = []
        layer.register_forward_hook(lambda *_: seen.append("forward"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("weight"))
        for _ in range(2):
            layer(x, y).sum().backward()
        assert sorted(seen) == sorted(["forward", "weight", "backward"] * 2)

    def test_state_dict_and_attributes_are_the_same(self) -> None:
        layer = kernelized(Detached)
        gradients(layer, *inputs())
        assert list(layer.state_dict()) == ["weight"]
        assert vars(layer).keys() == {*vars(Gate()), "forward"}
        copied = copy.deepcopy(layer)
        with torch.no_grad():
            copied.weight.fill_(1)
        reference, (x, y) = Gate(), inputs()
        reference.load_state_dict(copied.state_dict())
        torch.testing.assert_close(gradients(copied, x, y), gradients(reference, x, y))

    @by_name("kernel", [kernel_of(Correct), Detached])
    @pytest.mark.usefixtures("one_process")
    def test_data_parallel_training_works(self, kernel: Any) -> None:
        layer, reference, (x, y) = kernelized(kernel), Gate(), inputs()
        parallel = nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):
            square(parallel(x, y)).backward()
            square(reference(x, y)).backward()
        torch.testing.assert_close(layer.weight.grad, reference.weight.grad)

    def test_threads_can_train_one_layer(self) -> None:
        layer, reference = kernelized(Detached), Gate()
        errors: list[BaseException] = []

        def train(number: int) -> None:
            try:
                for rows in range(1, 12):
                    x = torch.full((rows, WIDTH), number / 7.0, requires_grad=True)
                    y = torch.ones(rows, WIDTH, requires_grad=True)
                    made, wanted = gradients(layer, x, y), gradients(reference, x, y)
                    torch.testing.assert_close(made, wanted)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@by_name(
    "kernel", [Detached, kernel_of(HidesSaves), kernel_of(OverwritesPrivate), kernel_of(Correct)]
)
def test_steps_whose_backward_never_runs_leak_nothing(kernel: Any) -> None:
    layer, (x, y) = kernelized(kernel), inputs()
    layer(x, y).sum().backward()
    before = live_tensors()
    for step in range(2000):
        loss = layer(x, y).sum()
        if step % 3 == 0:
            loss.backward()
    del loss
    assert live_tensors() <= before
