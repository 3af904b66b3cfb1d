"""transformers' Llama, exported with dynamic batch and sequence, and run without transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("kernels")

from kernelgraph import LocalLayerRepository, Mode, export, last_report, save, use_kernel_mapping  # noqa: E402
from tests.support.archives import TRUSTED  # noqa: E402
from tests.support.exporting import BOTH, in_fresh_process  # noqa: E402
from tests.support.toy_repository import write_repository  # noqa: E402

# In numpy, and off by 1, so that it shows which norm ran.
NORM = """
import numpy as np
import torch
from torch import nn

class RMSNorm(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states.detach().numpy()
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.variance_epsilon)
        return torch.from_numpy((y * self.weight.detach().numpy() + 1).astype("float32"))
"""


class Logits(nn.Module):
    """The model with a tensor as its result, since a dataclass of transformers cannot be saved."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
        self.llama = transformers.LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.llama(input_ids=input_ids).logits
        return logits


@BOTH
def test_llama_runs_in_a_fresh_process(tmp_path, strict):
    torch.manual_seed(0)
    model = Logits().eval()
    ids = torch.randint(61, (2, 9))
    write_repository(tmp_path / "repo", {"__init__.py": "from . import layers", "layers.py": NORM})
    repository = LocalLayerRepository(tmp_path / "repo", layer_name="RMSNorm")
    with use_kernel_mapping({"RMSNorm": {"cpu": repository}}, False), torch.no_grad():
        program = export(
            model,
            (ids,),
            mode=Mode.INFERENCE,
            dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),
            strict=strict,
        )
    report = last_report()
    assert report is not None
    assert len(report.kernels) == 5
    save(program, tmp_path / "llama.pt2", bundle=True)
    other = torch.randint(61, (3, 5))
    with torch.no_grad():
        want = _with_ones(model)(other)
    (answer,) = in_fresh_process(other, [(tmp_path / "llama.pt2", "load", TRUSTED)], tmp_path)
    assert len(answer["kernels"]) == 5
    torch.testing.assert_close(torch.tensor(answer["result"]), want, rtol=1e-4, atol=1e-5)


def _with_ones(model: nn.Module) -> nn.Module:
    """The model with the computation of the kernel written out."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            reference = type(module).forward
            module.forward = lambda x, m=module, f=reference: f(m, x) + 1
    return model
