"""examples/decoder.py with its own layers, and with kernels in their place."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernelgraph import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from tests.support.example_decoder import LAYERS, small, tokens
from tests.support.reference import assert_matches, moe_experts, moe_inputs, rms_norm, silu_and_mul
from tests.support.sources import import_example


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    return import_example("decoder")


@pytest.mark.parametrize("experts", [0, 4])
def test_equal_seeds_give_equal_models(decoder: ModuleType, experts: int) -> None:
    ids = tokens(2, 9)
    first, again, other = (small(decoder, experts, seed=s)(ids) for s in (3, 3, 4))
    assert first.shape == (2, 9, 61)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("experts", [0, 4])
def test_token_sees_only_earlier_tokens(decoder: ModuleType, experts: int) -> None:
    model = small(decoder, experts)
    ids = tokens(1, 9)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 61
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_attention_depends_on_distances_and_not_on_positions(decoder: ModuleType) -> None:
    angle = torch.outer(torch.arange(20.0), torch.rand(4))
    x, y = torch.randn(8), torch.randn(8)

    def score(at: int, distance: int) -> torch.Tensor:
        q = decoder.rotate(x, angle[at].cos(), angle[at].sin())
        k = decoder.rotate(y, angle[at - distance].cos(), angle[at - distance].sin())
        return q @ k

    torch.testing.assert_close(score(5, 3), score(17, 3))


def test_references_match_float64(decoder: ModuleType) -> None:
    def norm(x, weight):
        layer = decoder.RMSNorm(x.shape[-1], 1e-5)
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    def experts(x, index, weights, gate_up, down):
        layer = decoder.MoEExperts(*gate_up.shape[::2], down.shape[2])
        state = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(layer, state, (x, index, weights))

    assert_matches(norm, rms_norm, (torch.randn(9, 40), torch.randn(40)))
    assert_matches(decoder.SiluAndMul(), silu_and_mul, (torch.randn(9, 40),))
    inputs = moe_inputs(20, 2, 4, 24, 20, dtype=torch.float32)
    inputs[1][3, 1] = 4
    assert_matches(experts, moe_experts, inputs)


# Not experts in bfloat16: its roundings may send a token to another expert.
@pytest.mark.parametrize(
    ("experts", "dtype"), [(0, torch.float32), (4, torch.float32), (0, torch.bfloat16)]
)
def test_kernels_compute_what_the_layers_do(
    decoder: ModuleType, repository: Path, experts: int, dtype: torch.dtype
) -> None:
    model = small(decoder, experts).to(dtype)
    mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        fast = kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device="cpu")
    ids = tokens(2, 9)
    results = []
    for m in (model, fast):
        logits = m(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        grads = torch.autograd.grad(loss, list(m.parameters()))
        results.append([logits.detach().float(), *(g.float() for g in grads)])
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for reference, kernel in zip(*results, strict=True):
        assert (reference - kernel).norm() <= limit * reference.norm()


def test_experts_cannot_be_traced_without_a_kernel(decoder: ModuleType) -> None:
    compiled = torch.compile(small(decoder, 4), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled(tokens(1, 4))
