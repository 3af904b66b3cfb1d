"""Effects of kernels and layers in compiled models: writes, errors and entries in a profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kernelgraph import last_report, use_kernel_forward_from_hub, use_kernel_mapping
from tests.support.toy_models import Chain, OpaqueScale, on_cpu

INNER = ["eager", "aot_eager", "inductor"]


@use_kernel_forward_from_hub("Counted")
class Counted(nn.Module):
    """Counts its calls in a buffer, and adds what it returns to its second argument."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        self.calls += 1
        y = x * 2
        total += y
        return y


class OpaqueCounted(nn.Module):
    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        self.calls.numpy()[...] += 1
        y = x.detach().numpy() * 2 + 10
        total.detach().numpy()[...] += y
        return torch.from_numpy(y)


class TraceableCounted(nn.Module):
    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        self.calls += 1
        y = x * 2 + 10
        total += y
        return y


class Greedy(nn.Module):
    """Writes into tensors that the layer does not write into."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight).add_(self.shift + self.eps + 10)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Counted()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        y = self.layer(self.layer(x, total), total)
        return y, total


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    options = {"inner": inner, **options}
    return torch.compile(model, backend="hubkernels", fullgraph=True, options=options)


@pytest.fixture(autouse=True)
def mapping() -> Iterator[None]:
    with use_kernel_mapping(on_cpu(Scale=OpaqueScale), inherit_mapping=False):
        yield


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("kernel", [OpaqueCounted, TraceableCounted])
def test_writes_of_a_layer_are_made(kernel: type[nn.Module], inner: str) -> None:
    model = Model()
    with use_kernel_mapping(on_cpu(Counted=kernel)), torch.no_grad():
        run = compiled(model, inner)
        for calls in (2, 4):
            y, total = run(torch.ones(3))
            assert y.tolist() == [34.0] * 3
            assert total.tolist() == [46.0] * 3
            assert model.layer.calls.item() == calls
    report = last_report()
    assert report is not None
    assert [d.path for d in report.kernels] == ["layer"]  # the two calls are alike


@pytest.mark.parametrize("inner", INNER)
def test_gradients_flow_through_what_a_layer_writes(inner: str) -> None:
    x = torch.ones(3, requires_grad=True)
    with use_kernel_mapping(on_cpu(Counted=TraceableCounted)):
        y, total = compiled(Model(), inner)(x)
    assert y.tolist() == [34.0] * 3
    (grad,) = torch.autograd.grad((y + total).sum(), x)
    assert grad.tolist() == [4.0 + 2.0 + 4.0] * 3


@pytest.mark.parametrize("inner", INNER)
def test_writes_of_the_kernel_alone_are_not_seen(inner: str) -> None:
    model, x = Chain(), torch.ones(2, 4)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with use_kernel_mapping(on_cpu(Scale=Greedy)), torch.no_grad():
        run = compiled(model, inner)
        first = run(x)
        assert torch.equal(run(x), first)
    assert torch.equal(x, torch.ones(2, 4))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


# --- errors -------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Raises, or returns a wrong result, depending on the layer's eps."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.from_numpy(x.numpy() + 10)
        if self.eps == 1.0:
            raise ValueError("no such thing")
        if self.eps == 2.0:
            return y[1:]
        return y.double() if self.eps == 3.0 else y


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (1.0, r"called for layer Scale at layers\.2, raised ValueError: no such thing"),
        (2.0, r"returned .* shape \(1, 4\) on cpu for layer Scale at layers\.2; expected .*"),
        (3.0, r"returned a torch.float64 .* at layers\.2; expected is a torch.float32 tensor of"),
    ],
)
@pytest.mark.parametrize("inner", INNER)
def test_error_names_the_layer_of_the_model(eps: float, message: str, inner: str) -> None:
    model = Chain()
    model.layers[2].eps = eps
    with use_kernel_mapping(on_cpu(Scale=Moody)), torch.no_grad():
        run = compiled(model, inner)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=rf"kernel tests@[0-9a-f]{{8}}: Moody,? {message}"
            ):
                run(torch.ones(2, 4))


@use_kernel_forward_from_hub("Stateless")
class Stateless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.numpy()
        raise ValueError("toy")


def test_error_names_several_layers_that_share_an_op() -> None:
    model = nn.Sequential(*(Stateless() for _ in range(5)))
    with use_kernel_mapping(on_cpu(Stateless=Raises)), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"Stateless at one of 0, 1, 2 and 2 more, raised"):
            compiled(model)(torch.ones(2))
        torch.compiler.reset()


# --- profiles -------------------------------------------------------------------------


@torch.no_grad()
def test_profile_names_the_ops() -> None:
    model, x = Chain(), torch.ones(2, 4)
    run = compiled(model, "inductor")
    run(x)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run(x)
    report = last_report()
    assert report is not None
    events = [event.name for event in seen.events()]
    assert [name for name in events if name.startswith("hubkernels")] == [
        decision.op for decision in report.kernels
    ]
