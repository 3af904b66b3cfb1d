"""The example decoder trained on the example repository's kernels, and without any.

A kernel may compute what its layer does faster, but a model must learn the same: with the weights
and the batches alike, so are the losses, step by step. And no step may pay for a forward twice.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernelgraph import LocalLayerRepository, Mode, kernelize, last_report, use_kernel_mapping
from kernelgraph.selection.devices import Target
from tests.support.sources import import_example
from tests.support.toy_models import error

KERNELS = {"RMSNorm": "rms_norm", "SiluAndMul": "silu_and_mul", "MoEExperts": "moe_experts"}
"""The functions that the hub layers call."""
SIZES = {"vocab": 61, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 24}
STEPS = 50
EXPERTS = {"dense": 0, "experts": 4}
Call = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def repository() -> Path:
    root: Path = import_example("kernels/build").build(backends=("cpu",))
    return root


@pytest.fixture(autouse=True)
def ran(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Map the kernels, and count how often the forward of each runs."""
    kernels = {n: LocalLayerRepository(repository, layer_name=n) for n in KERNELS}
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def run(*args: Any) -> Tensor:
            counts[name] += type(args[0]) is Tensor  # a fake may be asked for the result's shape
            return function(*args)

        return run

    for name, kernel in kernels.items():
        module = sys.modules[kernel.load(Target("cpu")).__module__]
        function = getattr(module, KERNELS[name])
        monkeypatch.setattr(module, KERNELS[name], counting(name, function))
    with use_kernel_mapping({n: {"cpu": k} for n, k in kernels.items()}, inherit_mapping=False):
        yield counts


def decoder(experts: int = 0, layers: int = 2) -> Any:
    """Return the model with the same weights each time."""
    example = import_example("decoder")
    return example.Decoder(example.DecoderConfig(**SIZES, experts=experts, layers=layers), seed=3)


def calls(model: nn.Module) -> Counter[str]:
    """Return the number of extensible layers of each name; each is called once."""
    names = (getattr(module, "kernel_layer_name", None) for module in model.modules())
    return Counter(name for name in names if name is not None)


def times(count: int, counts: Counter[str]) -> Counter[str]:
    return Counter({name: count * n for name, n in counts.items()})


def batch(step: int, rows: int = 2, length: int = 9) -> Tensor:
    """Tokens that count up, one by one or two by two. The same four batches come again."""
    generator = torch.Generator().manual_seed(step % 4)
    start = torch.randint(61, (rows, 1), generator=generator)
    stride = torch.randint(1, 3, (rows, 1), generator=generator)
    return (start + stride * torch.arange(length)) % 61


def loss_of(call: Call, input_ids: Tensor) -> Tensor:
    logits = call(input_ids)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


def compiled(model: nn.Module, inner: Any = "aot_eager", **options: Any) -> Call:
    call: Call = torch.compile(
        model, backend="hubkernels", fullgraph=True, options={"inner": inner}, **options
    )
    return call


def kernelized(model: nn.Module) -> Call:
    call: Call = kernelize(model, mode=Mode.TRAINING)
    return call


WAYS: dict[str, Callable[[nn.Module], Call]] = {
    "eager": kernelized,
    "aot_eager": compiled,
    "inductor": functools.partial(compiled, inner="inductor"),
}
"""Functions that make a model run on the kernels."""
both = pytest.mark.parametrize("way", ["eager", "aot_eager"])


def all_kernels() -> bool:
    report = last_report()
    return report is not None and len(report.kernels) == len(report.decisions) > 0


@dataclass
class Run:
    """A training: the losses, and the weights and gradients after the last step."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


Backward = Callable[[Call, int], float]


def one_batch(call: Call, step: int) -> float:
    """Compute the gradient of a batch; return the loss."""
    loss = loss_of(call, batch(step))
    loss.backward()
    return loss.item()


def train(
    model: nn.Module,
    call: Call,
    steps: int,
    backward: Backward = one_batch,
    after_first: Callable[[], object] = lambda: None,
) -> Run:
    """Train ``model`` through ``call`` for this many steps."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=0.1, momentum=0.8)
    run = Run()
    for step in range(steps):
        optimizer.zero_grad()
        run.losses.append(backward(call, step))
        optimizer.step()
        if step == 0:
            after_first()
    run.weights = {n: p.detach() for n, p in model.named_parameters()}
    run.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return run


@functools.cache
def reference_of(experts: int, steps: int, layers: int = 2) -> Run:
    """Return the training without kernels."""
    model = decoder(experts, layers)
    return train(model, model, steps)


def assert_same(run: Run, expected: Run, tolerance: float = 1e-4) -> None:
    """Compare losses, and by their norms all weights and gradients."""
    torch.testing.assert_close(run.losses, expected.losses, rtol=tolerance, atol=tolerance)
    for found, wanted in ((run.weights, expected.weights), (run.gradients, expected.gradients)):
        assert found.keys() == wanted.keys()
        errors = {name: error(found[name], wanted[name]) for name in found}
        assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(
    ("way", "kind", "layers"),
    [
        ("eager", "dense", 2),
        ("eager", "experts", 2),
        ("aot_eager", "dense", 2),
        ("aot_eager", "experts", 2),
        ("inductor", "experts", 1),
    ],
)
def test_losses_of_fifty_steps_equal_those_without_kernels(
    way: str, kind: str, layers: int, ran: Counter[str]
) -> None:
    expected = reference_of(EXPERTS[kind], STEPS, layers)
    assert expected.losses[-1] < 0.1 * expected.losses[0]
    model = decoder(EXPERTS[kind], layers)
    # What runs while compiling, and where kernels are verified, does not count.
    run = train(model, WAYS[way](model), STEPS, after_first=ran.clear)
    assert all_kernels()
    # Roundings grow, as any small change of the weights does.
    assert_same(run, expected, tolerance=1e-2)
    assert ran == times(STEPS - 1, calls(model))


def two_micro_batches(call: Call, step: int) -> float:
    """Both forwards, then both backwards, the first one first."""
    losses = [loss_of(call, batch(step + half)) / 2 for half in range(2)]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses)


def one_after_the_other(call: Call, step: int) -> float:
    total = 0.0
    for half in range(2):
        loss = loss_of(call, batch(step + half)) / 2
        loss.backward()
        total += loss.item()
    return total


def together(call: Call, step: int) -> float:
    loss = sum(loss_of(call, batch(step + half)) / 2 for half in range(2))
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.item()


@both
@pytest.mark.parametrize("accumulate", [one_after_the_other, two_micro_batches, together])
def test_gradient_accumulation_equals_that_without_kernels(
    way: str, accumulate: Backward, ran: Counter[str]
) -> None:
    model, other = decoder(4), decoder(4)
    expected = train(model, model, 3, accumulate)
    run = train(other, WAYS[way](other), 3, accumulate, after_first=ran.clear)
    assert all_kernels()
    assert_same(run, expected)
    assert ran == times(2 * 2, calls(model))


@both
@pytest.mark.parametrize("looking", [torch.no_grad, torch.inference_mode])
def test_forward_without_a_backward_leaves_nothing(
    way: str, looking: Callable[[], Any], ran: Counter[str]
) -> None:
    """The training loop also computes losses that it drops, with and without gradients."""

    def backward(call: Call, step: int) -> float:
        dropped = loss_of(call, batch(step + 1))
        with looking():
            seen = loss_of(call, batch(step + 1))
        torch.testing.assert_close(seen, dropped.detach())
        return one_batch(call, step)

    model = decoder(4)
    run = train(model, WAYS[way](model), 3, backward, after_first=ran.clear)
    assert_same(run, reference_of(4, 3))
    assert ran == times(2 * 3, calls(model))


class Interrupted(Exception):
    """Raised in a backward."""


@both
@pytest.mark.parametrize("where", ["logits", "embed.weight"])
def test_backward_that_raises_leaves_the_next_step_right(
    way: str, where: str, ran: Counter[str]
) -> None:
    """The step can be repeated, whether it raised before or after the kernels' backwards."""

    def interrupt(gradient: Tensor) -> None:
        raise Interrupted

    def backward(call: Call, step: int) -> float:
        logits = call(batch(step))
        tensor = logits if where == "logits" else model.get_parameter(where)
        hook = tensor.register_hook(interrupt)
        with pytest.raises(Interrupted):
            logits.square().mean().backward()
        hook.remove()
        model.zero_grad()
        return one_batch(call, step)

    model = decoder(4)
    run = train(model, WAYS[way](model), 3, backward, after_first=ran.clear)
    assert_same(run, reference_of(4, 3))
    assert ran == times(2 * 2, calls(model))


@both
def test_retained_graph_allows_two_backwards(way: str, ran: Counter[str]) -> None:
    def backward(call: Call, step: int) -> float:
        loss = loss_of(call, batch(step))
        loss.backward(retain_graph=True)
        loss.backward()
        return loss.item()

    model, other = decoder(4), decoder(4)
    expected = train(model, model, 2, backward)
    # Otherwise AOTAutograd lends the backward what the forward saved, whatever is in the graph.
    with torch._functorch.config.patch(donated_buffer=False):  # type: ignore[attr-defined]
        run = train(other, WAYS[way](other), 2, backward, after_first=ran.clear)
    assert_same(run, expected)
    assert ran == calls(model)


class Checkpointed(nn.Module):
    """A block whose activations are not all kept."""

    def __init__(self, block: nn.Module, **options: Any) -> None:
        super().__init__()
        self.block = block
        self.options = options

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, **self.options)


def checkpointed(model: Any, **options: Any) -> Any:
    model.blocks = nn.ModuleList(Checkpointed(block, **options) for block in model.blocks)
    return model


def keep_kernels(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op.namespace == "hubkernels":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def assert_same_but_for_names(run: Run, expected: Run) -> None:
    for named in (run.weights, run.gradients):
        for name in list(named):
            named[name.replace(".block.", ".")] = named.pop(name)
    assert_same(run, expected)


@both
@pytest.mark.parametrize("kind", EXPERTS)
def test_activation_checkpointing_equals_that_without_kernels(
    way: str, kind: str, ran: Counter[str]
) -> None:
    model = checkpointed(decoder(EXPERTS[kind]))
    run = train(model, WAYS[way](model), 3, after_first=ran.clear)
    assert all_kernels()
    assert_same_but_for_names(run, reference_of(EXPERTS[kind], 3))
    again = calls(model.blocks)
    # Nothing in a block needs what its experts return, so whether they run again is not said.
    found = ran.pop("MoEExperts", 0), again.pop("MoEExperts", 0)
    assert 2 * found[1] <= found[0] <= 2 * 2 * found[1]
    once = calls(model.norm)
    assert ran == times(2 * 2, again) + times(2, once)


@pytest.mark.parametrize("kind", EXPERTS)
def test_selective_checkpointing_keeps_results_of_kernels(kind: str, ran: Counter[str]) -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_kernels)
    model = checkpointed(decoder(EXPERTS[kind]), context_fn=contexts)
    run = train(model, compiled(model), 3, after_first=ran.clear)
    assert all_kernels()
    assert_same_but_for_names(run, reference_of(EXPERTS[kind], 3))
    assert ran == times(2, calls(model))


def freeze_bottom(model: Any) -> None:
    """No gradient flows into the first block, so its layers only infer."""
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)


def freeze_layers(model: Any) -> None:
    """Gradients flow through the extensible layers, but not into their weights."""
    for module in model.modules():
        if hasattr(module, "kernel_layer_name"):
            module.requires_grad_(False)


def freeze_the_rest(model: Any) -> None:
    """Only the extensible layers learn, and of the experts one of two weights."""
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "kernel_layer_name"):
            module.requires_grad_(True)
            if hasattr(module, "gate_up_proj"):
                module.gate_up_proj.requires_grad_(False)


@both
@pytest.mark.parametrize("freeze", [freeze_bottom, freeze_layers, freeze_the_rest])
def test_frozen_parameters_get_no_gradient(
    way: str, freeze: Callable[[Any], None], ran: Counter[str]
) -> None:
    runs = []
    for make in (lambda model: model, WAYS[way]):
        model = decoder(4)
        freeze(model)
        ran.clear()
        runs.append(train(model, make(model), 3, after_first=ran.clear))
    assert all_kernels()
    assert_same(*runs)
    assert 0 < len(runs[0].gradients) < len(runs[0].weights)
    assert ran == times(2, calls(model))


@both
def test_parameters_may_be_frozen_and_thawed_while_training(way: str) -> None:
    """It works as without kernels: torch 2.11 does not notice the change in a compiled model."""

    def backward(call: Call, step: int) -> float:
        trained.blocks[0].requires_grad_(step % 2 == 1)
        return one_batch(call, step)

    plain = {"eager": lambda model: model, "aot_eager": torch.compile(backend="aot_eager")}
    runs = []
    for make in (plain[way], WAYS[way]):
        trained = decoder(layers=1)
        runs.append(train(trained, make(trained), 4, backward))
    assert all_kernels()
    assert_same(*runs)


@both
@pytest.mark.parametrize("kind", EXPERTS)
def test_autocast_equals_that_without_kernels(way: str, kind: str, ran: Counter[str]) -> None:
    def backward(call: Call, step: int) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(call, batch(step))
        loss.backward()
        return loss.item()

    runs = []
    for make in (lambda model: model, WAYS[way]):
        model = decoder(EXPERTS[kind])
        runs.append(train(model, make(model), 3, backward, after_first=ran.clear))
    assert all_kernels()
    assert {g.dtype for run in runs for g in run.gradients.values()} == {torch.float32}
    assert_same(*runs, tolerance=0.1)
    assert ran == times(2, calls(model))


@pytest.mark.parametrize("kind", EXPERTS)
def test_dynamic_shapes_train_in_one_graph(kind: str, ran: Counter[str]) -> None:
    def backward(call: Call, step: int) -> float:
        loss = loss_of(call, batch(step, rows=2 + step % 3, length=9 + step))
        loss.backward()
        return loss.item()

    model, other = decoder(EXPERTS[kind], 1), decoder(EXPERTS[kind], 1)
    expected = train(model, model, 6, backward)
    call = compiled(other, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined]
        run = train(other, call, 6, backward, after_first=ran.clear)
    assert all_kernels()
    assert_same(run, expected)
    assert ran == times(5, calls(model))
