"""Models of transformers trained on kernels that have a backward of their own.

The weights are random and the sizes tiny. Each model is trained for some steps without kernels and
with them, and has to learn the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("kernels")

from kernelgraph import (  # noqa: E402
    LocalLayerRepository,
    Mode,
    last_report,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from tests.models.test_transformers import EXPERTS, TEXT, kernelized  # noqa: E402
from tests.support.compiled_models import ours  # noqa: E402
from tests.support.other_package import write_kernel  # noqa: E402
from tests.support.sources import import_example  # noqa: E402
from tests.support.toy_models import error  # noqa: E402

STEPS = 8
LAYERS = """
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

def opaque(*tensors):
    # No tracer and no fake tensor gets past this.
    assert all(t.numel() == 0 or t.data_ptr() for t in tensors)

class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        opaque(x)
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        opaque(grad, x)
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))

class SiLU(nn.Module):
    def forward(self, input):
        return _SiLU.apply(input)

def half_turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

class Rotary(nn.Module):
    # What autograd makes of this is its backward.
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        opaque(q, k, cos, sin)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin
"""
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": TEXT,
    "Mixtral": {**TEXT, **EXPERTS},
    "Qwen3Moe": {**TEXT, **QWEN},
}


def build(name: str) -> Any:
    """Return the model with the same weights each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name], num_hidden_layers=2)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    if name != "Llama":
        # On CPUs the default one has a backward that Dynamo's backends cannot trace.
        model.set_experts_implementation("batched_mm")
    return model


@pytest.fixture(scope="module")
def repository() -> Path:
    root: Path = import_example("kernels/build").build(backends=("cpu",))
    return root


@pytest.fixture(autouse=True)
def mapping(repository: Path, tmp_path: Path) -> Iterator[None]:
    written = write_kernel(tmp_path / "layers", layers=LAYERS)
    kernels = {
        "RMSNorm": LocalLayerRepository(repository, layer_name="RMSNorm"),
        "MoEExperts": LocalLayerRepository(repository, layer_name="MoEExperts"),
        "SiLU": LocalLayerRepository(written, layer_name="SiLU"),
        "rotary_pos_emb": LocalLayerRepository(written, layer_name="Rotary"),
    }
    with use_kernel_mapping({n: {"cpu": k} for n, k in kernels.items()}, inherit_mapping=False):
        yield


def batch(step: int) -> Tensor:
    """Tokens that count up. The same four batches come again."""
    generator = torch.Generator().manual_seed(step % 4)
    return (torch.randint(64, (2, 1), generator=generator) + torch.arange(8)) % 64


def train(model: Any, call: Callable[..., Any]) -> list[float]:
    """Train ``model`` through ``call``; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = call(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[Any]:
    yield torch.compile(model, fullgraph=True, **ours("aot_eager"))


WAYS: dict[str, Callable[[Any], Any]] = {
    "eager": functools.partial(kernelized, mode=Mode.TRAINING),
    "compiled": compiled,
}


def assert_learns_the_same(name: str, model: Any, way: str) -> set[str]:
    """Train ``model`` with kernels and a copy without; return the layers that had kernels."""
    reference = build(name)
    losses = train(reference, reference)
    with WAYS[way](model) as call:
        torch.testing.assert_close(train(model, call), losses, rtol=1e-4, atol=1e-4)
        report = last_report()
    assert losses[-1] < 0.8 * losses[0]
    trained = dict(model.named_parameters())
    for path, parameter in reference.named_parameters():
        assert error(trained[path], parameter) < 1e-4, path
    assert report is not None
    assert len(report.kernels) == len(report.decisions)
    return {d.layer for d in report.decisions}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_those_without_kernels(name: str, way: str) -> None:
    assert assert_learns_the_same(name, build(name), way) == {"RMSNorm", "SiLU", "rotary_pos_emb"}


def like_hidden_states(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return torch.empty_like(hidden_states)


def with_extensible_experts(model: Any) -> Any:
    """``model`` with experts of a class that is tagged; those of transformers are not."""
    cls = type(model.model.layers[0].mlp.experts)
    tagged = type(f"Tagged{cls.__name__}", (cls,), {})
    replace_kernel_forward_from_hub(tagged, "MoEExperts", fake=like_hidden_states)
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = tagged
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_losses_with_an_expert_kernel_equal_those_without(name: str, way: str) -> None:
    model = with_extensible_experts(build(name))
    assert "MoEExperts" in assert_learns_the_same(name, model, way)
