"""Models of transformers, whose layers the ``kernels`` package tags, with no call of the user's.

Their weights are random and their sizes tiny. Each test compiles a model as its users do, and
compares it with the same model kernelized eagerly.
"""

from __future__ import annotations

import contextlib
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

transformers: Any = pytest.importorskip("transformers")
kernels: Any = pytest.importorskip("kernels")

from kernelgraph import (  # noqa: E402
    LocalFuncRepository,
    LocalLayerRepository,
    Mode,
    kernelize,
    last_report,
    use_kernel_mapping,
)
from kernelgraph.report import Decision  # noqa: E402
from tests.support.compiled_models import Counter, ours, plain  # noqa: E402
from tests.support.other_package import write_kernel  # noqa: E402

LAYERS = """
import torch
from torch import nn
from torch.nn import functional as F

def opaque(*tensors):
    # No tracer and no fake tensor gets past this.
    assert all(t.numel() == 0 or t.data_ptr() for t in tensors)

class RMSNorm(nn.Module):
    def forward(self, hidden_states):
        opaque(hidden_states)
        wide = hidden_states.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        normal = wide * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * normal.to(hidden_states.dtype)

class MarkedRMSNorm(nn.Module):
    def forward(self, hidden_states):
        opaque(hidden_states)
        wide = hidden_states.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(variance + 10.0)).to(hidden_states.dtype)

class SiLU(nn.Module):
    def forward(self, input):
        opaque(input)
        return F.silu(input)

class GeLU(nn.Module):
    def forward(self, input):
        opaque(input)
        return F.gelu(input)

class MarkedGeLU(nn.Module):
    def forward(self, input):
        opaque(input)
        return F.gelu(input) - 0.25

class GeluTanh(nn.Module):
    def forward(self, input):
        opaque(input)
        return F.gelu(input, approximate="tanh")

class MarkedGeluTanh(nn.Module):
    def forward(self, input):
        opaque(input)
        return F.gelu(input, approximate="tanh") - 0.25

def half_turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

class Rotary(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        opaque(q, k, cos, sin)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin
"""

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
TOKENS = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
TEXT = {**SMALL, **TOKENS, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {"image_size": 16, "patch_size": 8}

# The classes' stem, their settings, and the calls of each layer in a forward of two blocks.
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Llama": (TEXT, {"RMSNorm": 5, "SiLU": 2, "rotary_pos_emb": 2}),
    "Qwen3": ({**TEXT, "head_dim": 8}, {"RMSNorm": 9, "SiLU": 2, "rotary_pos_emb": 2}),
    "Mistral": (TEXT, {"RMSNorm": 5, "SiLU": 2, "rotary_pos_emb": 2}),
    "Mixtral": ({**TEXT, **EXPERTS}, {"RMSNorm": 5, "SiLU": 2, "rotary_pos_emb": 2}),
    "Gemma": ({**TEXT, "head_dim": 8}, {"GeluTanh": 2, "rotary_pos_emb": 2}),
    "ViT": ({**SMALL, **IMAGE}, {"GeLU": 2}),
}


def build(name: str, blocks: int = 1) -> Any:
    """Return the model with the same weights each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0], num_hidden_layers=blocks)
    head = "ForImageClassification" if name == "ViT" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).eval()


def inputs(name: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 16) if name == "ViT" else torch.randint(1, 64, (2, 6))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel(tmp_path_factory.mktemp("kernel") / "layers", layers=LAYERS)


@pytest.fixture(autouse=True)
def marked(kernel: Path) -> Iterator[None]:
    """Kernels whose results show that they ran, besides those that equal the reference."""
    names = {
        "RMSNorm": "MarkedRMSNorm",
        "SiLU": "SiLU",
        "GeLU": "MarkedGeLU",
        "GeluTanh": "MarkedGeluTanh",
        "rotary_pos_emb": "Rotary",
    }
    with use_kernel_mapping(
        {
            layer: {"cpu": LocalLayerRepository(kernel, layer_name=name)}
            for layer, name in names.items()
        },
        inherit_mapping=False,
    ):
        yield


@contextlib.contextmanager
def kernelized(model: nn.Module, mode: Mode = Mode.INFERENCE) -> Iterator[Any]:
    """``model`` with its kernels in place, eagerly; afterwards as it was."""
    kernelize(model, mode=mode)
    try:
        yield model
    finally:
        with use_kernel_mapping({}, inherit_mapping=False):
            kernelize(model, mode=mode)


def decisions() -> tuple[Decision, ...]:
    report = last_report()
    assert report is not None
    assert report.source == "torch.compile"
    return report.decisions


def assert_all_kernels() -> None:
    found = decisions()
    assert found
    assert [d for d in found if not d.uses_kernel] == []


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    generated: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=4,
        do_sample=False,
        **options,
    )
    return generated


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_model_uses_a_kernel_for_every_layer(name: str, kernel: Path) -> None:
    model, x = build(name, blocks=2), inputs(name)
    ops: Tally[str] = Tally()

    def inner(graph_module: Any, example_inputs: list[Any]) -> Callable[..., Any]:
        targets = (str(node.target) for node in graph_module.graph.nodes)
        ops.update(t.removesuffix(".default") for t in targets if t.startswith("hubkernels."))
        run: Callable[..., Any] = graph_module.forward
        return run

    logits = torch.compile(model, fullgraph=True, **ours(inner))(x).logits
    assert_all_kernels()
    of_layer = {d.op.replace("::", "."): d.layer for d in decisions()}
    calls: Tally[str] = Tally()
    for op, count in ops.items():
        calls[of_layer[op]] += count
    assert dict(calls) == MODELS[name][1]
    assert {d.kernel.partition("@")[0] for d in decisions()} == {str(kernel)}
    assert not torch.allclose(logits, model(x).logits)
    with kernelized(model):
        torch.testing.assert_close(logits, model(x).logits)


@torch.no_grad()
def test_report_has_the_paths_of_the_model() -> None:
    model = build("Mixtral", blocks=2)
    torch.compile(model, **ours("eager"))(inputs("Mixtral"))
    paths = {d.path for d in decisions()}
    assert paths - {path for path, _ in model.named_modules()} == {"apply_rotary_pos_emb"}
    assert "model.layers.1.mlp.experts.act_fn" in paths


@torch.no_grad()
def test_logits_equal_those_of_the_references(kernel: Path) -> None:
    model, x = build("Qwen3"), inputs("Qwen3")
    same = {"RMSNorm": {"cpu": LocalLayerRepository(kernel, layer_name="RMSNorm")}}
    with use_kernel_mapping(same):
        compiled = torch.compile(model, fullgraph=True, **ours("eager"))
        torch.testing.assert_close(compiled(x).logits, model(x).logits, rtol=0, atol=0)
    assert_all_kernels()


@torch.no_grad()
def test_logits_through_inductor_equal_those_of_the_references() -> None:
    model, x = build("Llama"), inputs("Llama")
    logits = torch.compile(model, fullgraph=True, backend="hubkernels")(x).logits
    assert_all_kernels()
    with kernelized(model):
        torch.testing.assert_close(logits, model(x).logits)


@torch.no_grad()
def test_mapping_of_the_kernels_package_is_used(kernel: Path) -> None:
    mapping = {
        "RMSNorm": {
            kernels.Device("cpu"): {
                kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE: kernels.LocalLayerRepository(
                    kernel, layer_name="MarkedRMSNorm"
                )
            }
        },
        "rotary_pos_emb": {"cpu": kernels.LocalLayerRepository(kernel, layer_name="Rotary")},
    }
    model, x = build("Llama"), inputs("Llama")
    torch.compile(model, **ours("eager"))(x)
    expected = {(d.layer, d.op) for d in decisions() if d.layer in mapping}
    torch.compiler.reset()
    with use_kernel_mapping(mapping, inherit_mapping=False):
        logits = torch.compile(model, fullgraph=True, **ours("eager"))(x).logits
    # The same content gives the same ops, whoever loads it.
    assert {(d.layer, d.op) for d in decisions() if d.uses_kernel} == expected
    with kernelized(model):
        torch.testing.assert_close(logits, model(x).logits)


class TestGenerate:
    @pytest.mark.parametrize(
        ("name", "cache"),
        [("Llama", "dynamic"), ("Llama", "static"), ("Mixtral", "static"), ("Gemma", "dynamic")],
    )
    def test_generate_returns_the_same_tokens(self, name: str, cache: str) -> None:
        tokens, counts = inputs(name), []
        options = {} if cache == "dynamic" else {"cache_implementation": "static"}
        for backend in (plain, ours):
            torch.compiler.reset()
            model, counter = build(name), Counter()
            model.compile(**backend(counter))
            generated = generate(model, tokens, **options)
            counts.append(counter.graphs)
        assert_all_kernels()
        assert counts[1] == counts[0]
        reference = build(name)
        with kernelized(reference):
            assert torch.equal(generated, generate(reference, tokens, **options))

    def test_generate_works_with_a_compiled_forward(self) -> None:
        model, tokens = build("Qwen3"), inputs("Qwen3")
        with kernelized(model):
            expected = generate(model, tokens)
        model.forward = torch.compile(model.forward, **ours("eager"))
        assert torch.equal(generate(model, tokens), expected)
        assert_all_kernels()

    def test_generate_compiles_by_itself(self, kernel: Path) -> None:
        model, tokens = build("Mistral"), inputs("Mistral")
        config = transformers.CompileConfig(
            backend="hubkernels", mode=None, fullgraph=True, options={"inner": "eager"}
        )
        config._compile_all_devices = True  # on the cpu it does not, otherwise
        options = {"cache_implementation": "static"}
        with same(kernel):  # the prompt is not run compiled
            generated = generate(model, tokens, **options, compile_config=config)
        assert_all_kernels()
        assert torch.equal(generated, generate(model, tokens, **options))

    @torch.no_grad()
    def test_second_generate_compiles_nothing(self) -> None:
        model, tokens, counter = build("Llama"), inputs("Llama"), Counter()
        model.compile(**ours(counter))
        first = generate(model, tokens)
        graphs = counter.graphs
        assert torch.equal(generate(model, tokens), first)
        assert counter.graphs == graphs


Step = tuple[Tensor, dict[str, Tensor]]


def training_step(model: Any, call: Any, tokens: Tensor) -> Step:
    """Return the loss, and the gradients by parameter name."""
    model.zero_grad()
    loss = call(input_ids=tokens, labels=tokens).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def same(kernel: Path) -> Any:
    """The mapping with a kernel whose own gradient equals the reference's."""
    return use_kernel_mapping(
        {"RMSNorm": {"cpu": LocalLayerRepository(kernel, layer_name="RMSNorm")}}
    )


def assert_same_step(step: Step, expected: Step) -> None:
    torch.testing.assert_close(step, expected)
    assert len(step[1]) > 5


class TestTraining:
    def test_gradients_equal_those_of_the_references(self, kernel: Path) -> None:
        model, tokens = build("Llama").train(), inputs("Llama")
        with same(kernel):
            compiled = torch.compile(model, fullgraph=True, **ours("aot_eager"))
            step = training_step(model, compiled, tokens)
        assert_all_kernels()
        assert {d.mode for d in decisions()} == {str(Mode.TRAINING | Mode.TORCH_COMPILE)}
        assert_same_step(step, training_step(model, model, tokens))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_equals_that_of_the_references(
        self, reentrant: bool, kernel: Path
    ) -> None:
        model, tokens = build("Llama").train(), inputs("Llama")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with same(kernel):
            compiled = torch.compile(model, **ours("aot_eager"))
            step = training_step(model, compiled, tokens)
        assert_all_kernels()
        assert_same_step(step, training_step(model, model, tokens))

    @pytest.mark.usefixtures("one_process")
    def test_distributed_data_parallel_uses_kernels(self, kernel: Path) -> None:
        model, tokens = build("Llama").train(), inputs("Llama")
        expected = training_step(model, model, tokens)
        with same(kernel):
            parallel = torch.compile(DistributedDataParallel(model), **ours("aot_eager"))
            step = training_step(model, parallel, tokens)
        assert_all_kernels()
        assert_same_step(step, expected)

    def test_lora_adapters_train_beside_kernels(self, kernel: Path) -> None:
        peft = pytest.importorskip("peft")
        modules = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(target_modules=modules, r=4, init_lora_weights=False)
        model, tokens = peft.get_peft_model(build("Llama"), config), inputs("Llama")
        with same(kernel):
            compiled = torch.compile(model, fullgraph=True, **ours("aot_eager"))
            step = training_step(model, compiled, tokens)
        assert_all_kernels()
        assert {d.path for d in decisions()} - {"apply_rotary_pos_emb"} <= {
            path for path, _ in model.named_modules()
        }
        assert_same_step(step, training_step(model, model, tokens))


@torch.no_grad()
def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    tokens, counts = inputs("Llama"), []
    for backend in (plain, ours):
        torch.compiler.reset()
        model, counter = build("Llama", blocks=2), Counter()
        for block in model.model.layers:
            block.compile(**backend(counter))
        logits = model(tokens, use_cache=False).logits
        counts.append(counter.graphs)
    assert counts == [1, 1]
    norm = model.model.norm  # which is in no block
    with kernelized(model):
        norm.__dict__.pop("forward")
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_function_kernel_serves_an_extensible_function(kernel: Path) -> None:
    """`apply_rotary_pos_emb` is a function in transformers too; ours may be any that fits."""
    source = (kernel / "build" / "torch-universal" / "__init__.py").read_text()
    assert "def rotary" not in source
    functions = write_kernel(kernel.parent / "functions", layers=LAYERS)
    rotary = """
def rotary(q, k, cos, sin, unsqueeze_dim=1):
    return layers.Rotary()(q, k, cos, sin, unsqueeze_dim)
"""
    (functions / "build" / "torch-universal" / "__init__.py").write_text(source + rotary)
    metadata = functions / "build" / "torch-universal" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"digest"', '"was"'))
    model, x = build("Llama"), inputs("Llama")
    expected = model(x).logits
    for package in (LocalFuncRepository, kernels.LocalFuncRepository):
        torch.compiler.reset()
        mapping = {"rotary_pos_emb": {"cpu": package(functions, func_name="rotary")}}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            compiled = torch.compile(model, fullgraph=True, **ours("eager"))
            torch.testing.assert_close(compiled(x).logits, expected)
            used = [d for d in decisions() if d.uses_kernel]
            assert [d.layer for d in used] == ["rotary_pos_emb"]
            assert used[0].kernel.endswith(": rotary")
            with kernelized(model):
                torch.testing.assert_close(model(x).logits, expected)
