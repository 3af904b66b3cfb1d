"""Layers that another package tagged become ops in compiled models, without a call by the user."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

import kernelgraph
from kernelgraph import Mode, register_kernel_mapping, use_kernel_mapping
from tests.support.compiled_models import Counter, CountingAot, decisions, ours, plain
from tests.support.other_package import write_kernel
from tests.support.toy_models import Chain, OpaqueScale, Scale, TraceableScale, on_cpu


def scale_of(theirs: Any) -> type[nn.Module]:
    """`Scale`, tagged by another package."""

    class Theirs(Scale):
        kernel_layer_name = None

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.shift + self.eps

    tagged: type[nn.Module] = theirs.use_kernel_forward_from_hub("Scale")(Theirs)
    return tagged


class Block(nn.Module):
    def __init__(self, scale: type[nn.Module]) -> None:
        super().__init__()
        self.scale, self.linear = scale(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale(x))


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


class TestClasses:
    @torch.no_grad()
    def test_tagged_class_becomes_an_op(self, theirs: Any) -> None:
        block, x = Block(scale_of(theirs)), torch.randn(3, 4)
        compiled = torch.compile(block, fullgraph=True, **ours("eager"))
        torch.testing.assert_close(compiled(x), block.linear(block.scale(x) + 10))
        assert [d.path for d in decisions() if d.uses_kernel] == ["scale"]

    @torch.no_grad()
    def test_blocks_compiled_one_by_one_share_a_graph(self, theirs: Any) -> None:
        """There are as many graphs as without kernels: an always true condition guards nothing."""
        scale, x, counts = scale_of(theirs), torch.randn(3, 4), []
        for backend in (plain, ours):
            torch.compiler.reset()
            counter = Counter()
            for block in [Block(scale) for _ in range(4)]:
                block.compile(fullgraph=True, **backend(counter))
                block(x)
            counts.append(counter.graphs)
        assert counts == [1, 1]

    @torch.no_grad()
    def test_condition_that_may_refuse_is_asked_of_each_block(self, theirs: Any) -> None:
        scale, x = scale_of(theirs), torch.randn(3, 4)
        scale.kernel_condition = staticmethod(lambda module: module.eps < 1)  # type: ignore[attr-defined]
        blocks = [Block(scale) for _ in range(3)]
        blocks[1].scale.eps = 2.0
        for block, extra in zip(blocks, (10, 0, 10), strict=True):
            block.compile(fullgraph=True, **ours("eager"))
            torch.testing.assert_close(block(x), block.linear(block.scale(x) + extra))


class TestFunctions:
    @torch.no_grad()
    def test_tagged_function_becomes_an_op(self, theirs: Any, tmp_path: Path) -> None:
        @theirs.use_kernel_forward_from_hub("double")
        def double(x: Tensor) -> Tensor:
            return 2 * x

        @theirs.use_kernelized_func(double)
        class Doubling(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return double(x) + 1

        path, x = write_kernel(tmp_path / "kernel", result=10), torch.randn(3)
        for repository in (
            theirs.LocalFuncRepository(path, func_name="shifted"),
            theirs.LocalLayerRepository(path, layer_name="Add"),
            kernelgraph.LocalFuncRepository(path, func_name="shifted"),
        ):
            torch.compiler.reset()
            with use_kernel_mapping({"double": {"cpu": {theirs.Mode.FALLBACK: repository}}}):
                compiled = torch.compile(Doubling(), fullgraph=True, **ours("aot_eager"))
                torch.testing.assert_close(compiled(x), x + 11)
            (decision,) = decisions()
            assert decision.kernel.startswith(f"{path}@")
            assert decision.op.startswith("hubkernels::toy_")
            assert decision.op.split("_")[1] == decision.kernel.split(": ")[1]

    @torch.no_grad()
    def test_two_functions_become_two_ops(self, theirs: Any, tmp_path: Path) -> None:
        path, x = write_kernel(tmp_path / "kernel", result=10), torch.randn(3)

        @theirs.use_kernel_forward_from_hub("first")
        def first(x: Tensor) -> Tensor:
            return x * 1

        @theirs.use_kernel_forward_from_hub("second")
        def second(x: Tensor) -> Tensor:
            return -x

        names = {"first": "shifted", "second": "plain"}
        mapping = {
            layer: {"cpu": theirs.LocalFuncRepository(path, func_name=name)}
            for layer, name in names.items()
        }
        with use_kernel_mapping(mapping):
            compiled = torch.compile(lambda x: (first(x), second(x)), **ours("eager"))
            torch.testing.assert_close(compiled(x), (x + 10, x - 10))


class TestWrapped:
    def test_layer_in_an_adapter_becomes_an_op(self) -> None:
        class Adapter(nn.Module):
            """The layer, with a product of two small matrices beside it, as for LoRA."""

            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base_layer = base.requires_grad_(False)
                self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

            def __getattr__(self, name: str) -> Any:
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(super().__getattr__("base_layer"), name)

            def forward(self, x: Tensor) -> Tensor:
                return self.base_layer(x) + self.up(self.down(x))

        model, x = nn.Sequential(Adapter(Scale()), nn.Linear(4, 4)), torch.randn(3, 4)
        with use_kernel_mapping(on_cpu(Scale=TraceableScale)):
            compiled = torch.compile(model, fullgraph=True, **ours("aot_eager"))
            compiled(x).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        assert [d.path for d in decisions() if d.uses_kernel] == ["0.base_layer"]
        model.zero_grad()
        model[1](model[0](x) + 20).sum().backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, trained[name].grad)


SIZE = 600
"""The size of a linear layer that is larger than a bucket of 1 MiB."""


@pytest.mark.usefixtures("one_process")
class TestDistributedDataParallel:
    """Its backend stands between Dynamo and hubkernels, and hands over a graph in parts."""

    @pytest.mark.parametrize("inside", [True, False], ids=["compiled-inside", "compiled-around"])
    def test_gradients_are_right_in_a_graph_in_parts(self, inside: bool) -> None:
        model, x = Chain(SIZE), torch.randn(3, SIZE)
        if inside:
            compiled = torch.compile(model, **ours(aot_eager := CountingAot()))
            parallel: Any = DistributedDataParallel(compiled, bucket_cap_mb=1)
        else:
            parallel = DistributedDataParallel(model, bucket_cap_mb=1)
            parallel = torch.compile(parallel, **ours(aot_eager := CountingAot()))
        out = parallel(x)
        assert aot_eager.graphs > 1
        out.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        assert [d.path for d in decisions() if d.uses_kernel] == ["layers.0", "layers.2"]
        model.zero_grad()
        first, linear, last = model.layers
        by_hand = last(linear(first(x) + 10)) + 10
        by_hand.sum().backward()
        torch.testing.assert_close(out, by_hand)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)

    def test_layer_tagged_late_is_captured_in_the_last_part(self, theirs: Any) -> None:
        model, x = Chain(SIZE), torch.randn(3, SIZE)
        torch.compile(model, **ours("eager"))(x)  # adopts the classes that are tagged now
        model.layers.extend([nn.Linear(SIZE, SIZE), scale_of(theirs)(SIZE)])
        parallel = DistributedDataParallel(model, bucket_cap_mb=1)
        out = torch.compile(parallel, **ours(aot_eager := CountingAot()))(x)
        assert aot_eager.graphs > 1
        paths = [d.path for d in decisions() if d.uses_kernel]
        assert paths == ["layers.0", "layers.2", "layers.4"]
        for layer, extra in zip(model.layers, (10, 0, 10, 0, 10), strict=True):
            x = layer(x) + extra
        torch.testing.assert_close(out, x)


class TestMappingChanges:
    """A call has the kernels of the mapping in force where it is made."""

    @torch.no_grad()
    def test_call_decides_by_the_mapping_at_that_time(self) -> None:
        model, x = nn.Sequential(Scale()), torch.randn(3, 4)
        reference, counter = model(x), Counter()
        compiled = torch.compile(model, fullgraph=True, **ours(counter))
        torch.testing.assert_close(compiled(x), reference + 10)
        register_kernel_mapping(on_cpu(Scale=TraceableScale))
        torch.testing.assert_close(compiled(x), reference + 20)
        with use_kernel_mapping({}, inherit_mapping=False):
            torch.testing.assert_close(compiled(x), reference)
        assert counter.graphs == 3
        torch.testing.assert_close(compiled(x), reference + 20)
        assert counter.graphs == 3

    @torch.no_grad()
    def test_models_of_one_class_have_the_kernels_of_their_own_scopes(self) -> None:
        def adding(number: int) -> type[nn.Module]:
            def forward(self: Any, x: Tensor) -> Tensor:
                return x * self.weight + self.shift + self.eps + number

            return type("Adding", (nn.Module,), {"forward": forward})

        x = torch.randn(3, 4)
        for number in range(3):
            model = nn.Sequential(Scale())
            compiled = torch.compile(model, fullgraph=True, **ours("eager"))
            with use_kernel_mapping(on_cpu(Scale=adding(number))):
                torch.testing.assert_close(compiled(x), model(x) + number)

    @torch.no_grad()
    def test_threads_have_the_kernels_of_their_own_scopes(self) -> None:
        model, x = nn.Sequential(Scale()), torch.randn(3, 4)
        compiled = torch.compile(model, fullgraph=True, **ours("eager"))
        torch.testing.assert_close(compiled(x), model(x) + 10)
        found = []

        def run() -> None:  # a thread starts outside of all scopes
            with use_kernel_mapping(on_cpu(Scale=TraceableScale)), torch.no_grad():
                found.append(compiled(x))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        torch.testing.assert_close(found, [model(x) + 20])


class TestRecompiles:
    """A model with kernels is compiled anew exactly where it would be without kernels."""

    @staticmethod
    def counts(run: Callable[[Any, Chain, Counter], list[int]], **options: Any) -> list[list[int]]:
        made = []
        for backend in (plain, ours):
            torch.compiler.reset()
            model, counter = Chain(), Counter()
            compiled = torch.compile(model, fullgraph=True, **backend(counter), **options)
            made.append(run(compiled, model, counter))
        return made

    @torch.no_grad()
    @pytest.mark.parametrize("dynamic", [None, True, False])
    def test_other_sizes_recompile_as_without_kernels(self, dynamic: bool | None) -> None:
        def run(compiled: Any, model: Chain, counter: Counter) -> list[int]:
            counts = []
            for size in ((3, 4), (3, 4), (5, 4), (7, 4), (3, 4), (2, 3, 4), (2, 5, 4), (9, 5, 4)):
                compiled(torch.randn(size))
                counts.append(counter.graphs)
            return counts

        without, with_kernels = self.counts(run, dynamic=dynamic)
        assert with_kernels == without

    @torch.no_grad()
    def test_training_and_eval_recompile_as_without_kernels(self) -> None:
        def run(compiled: Any, model: Chain, counter: Counter) -> list[int]:
            counts = []
            for training, _ in itertools.product((True, False, True, False), range(2)):
                model.train(training)
                compiled(torch.randn(3, 4))
                counts.append(counter.graphs)
            return counts

        without, with_kernels = self.counts(run)
        assert with_kernels == without

    def test_gradients_on_and_off_recompile_as_without_kernels(self) -> None:
        def run(compiled: Any, model: Chain, counter: Counter) -> list[int]:
            counts = []
            for enabled, requires in itertools.product((True, False, True), (True, False)):
                model.requires_grad_(requires)
                with torch.set_grad_enabled(enabled):
                    compiled(torch.randn(3, 4))
                counts.append(counter.graphs)
            return counts

        without, with_kernels = self.counts(run)
        assert with_kernels == without


def test_mode_of_another_package_is_taken_as_an_option(theirs: Any) -> None:
    model, x = nn.Sequential(Scale()), torch.randn(3, 4)
    options = {"inner": "eager", "kernel_mode": theirs.Mode.INFERENCE}
    with torch.no_grad():
        torch.compile(model, backend="hubkernels", options=options)(x)
    assert decisions()[0].mode == str(Mode.INFERENCE | Mode.TORCH_COMPILE)


@torch.no_grad()
def test_mode_of_another_package_is_taken_by_rewrite(theirs: Any) -> None:
    model, x = nn.Sequential(Scale()), torch.randn(3, 4)
    graph_module = fx.GraphModule(model, kernelgraph.Tracer().trace(model))
    kernelgraph.rewrite(graph_module, mode=theirs.Mode.INFERENCE, example_inputs=(x,))
    assert [d.uses_kernel for d in decisions()] == [True]
    torch.testing.assert_close(graph_module(x), model(x) + 10)
