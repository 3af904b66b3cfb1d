"""Random layers, kernels for them, and models of them, for hypothesis.

A layer is drawn as a small immutable spec and written out as Python: a class whose ``forward`` is
the reference, and a hub layer that computes the same and marks it by adding 10. What is drawn
decides what the two take, read, return and write into, and not what they compute: every tensor but
the first comes in as one number that each of its elements has a weight of its own in (`mix`).

A failing example prints as the source of its model; `Model.text` has all of it.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kernelgraph import replace_kernel_forward_from_hub

# --- what the written code calls ----------------------------------------------------------------


def mix(t: Tensor) -> Tensor:
    """One number of ``t``, to which each element gives by where it is."""
    places = torch.arange(1, t.numel() + 1, device=t.device).reshape(t.shape)
    total = (t * places).sum()
    if t.is_floating_point() or t.is_complex():
        return total / (4 * t.numel() + 1)
    return total % 7


def native(t: Tensor) -> Tensor:
    """The same memory as another library sees it; no fake tensor has any."""
    t = t.detach().resolve_conj().resolve_neg()
    if t.dtype is torch.bfloat16:  # which numpy does not know
        return torch.from_numpy(t.view(torch.int16).numpy()).view(torch.bfloat16)
    return torch.from_numpy(t.numpy())


def natives(value: Any) -> Any:
    """`native` of each tensor of a nested value."""
    return torch.utils._pytree.tree_map_only(Tensor, native, value)


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1) if t.dim() else t


def narrowed(t: Tensor) -> Tensor:
    return t.narrow(0, 0, (t.shape[0] + 1) // 2) if t.dim() else t


def ended(t: Tensor) -> Tensor:
    return t.narrow(0, t.shape[0] // 2, (t.shape[0] + 1) // 2) if t.dim() else t


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t.real if t.is_complex() and not dtype.is_complex else t).to(dtype)


class Box(nn.Module):
    """A module that a layer reaches into."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(2, 2, dtype=dtype)
        self.scale = 0.5


# --- specs --------------------------------------------------------------------------------------

PARAMETERS = {  # in the order of a signature: how it is declared, and what it adds to the sum
    "y": ("y", "mix(y)"),
    "bias": ("bias=None", "(0 if bias is None else mix(bias))"),
    "pair": ("pair=(None, 2)", "(pair[1] if pair[0] is None else mix(pair[0]) * pair[1])"),
    "n": ("n=2", "n"),
    "alpha": ("alpha=0.5", "alpha"),
    "flip": ("flip=False", "(-1 if flip else 1)"),
    "how": ("how='plus'", "(1 if how == 'plus' else -1)"),
    "kind": ("kind=torch.float32", "(1 if kind is torch.float32 else 2)"),
    "size": ("size=(1, 2)", "sum(size)"),
    "listed": ("listed=()", "sum(mix(t) for t in listed)"),
    "named": ("named=None", "sum(mix(t) * len(k) for k, t in (named or {}).items())"),
    "rest": ("*rest", "sum(mix(t) for t in rest)"),
    "gate": ("gate", "mix(gate)"),
    "scale": ("scale=1.5", "scale"),
    "more": ("**more", "sum(mix(t) for t in more.values())"),
}
TENSOR_PARAMETERS = ("x", "y", "bias", "pair", "listed", "named", "rest", "gate", "more")
REQUIRED = ("y", "gate")
KEYWORD_ONLY = ("gate", "scale")

STATE = {  # how it is made, and what it adds to the sum
    "weight": ("self.weight = parameter(dtype, 3)", "mix(self.weight)"),
    "tied": ("self.tied = self.weight", "mix(self.tied)"),
    "offset": ("self.register_buffer('offset', values(dtype, 2))", "mix(self.offset)"),
    "missing": ("self.register_parameter('missing', None)", "(self.missing is None)"),
    "plain": ("self.plain = values(dtype, 2, 2).t()", "mix(self.plain)"),
    "proj": ("self.proj = nn.Linear(2, 2, dtype=real)", "mix(self.proj(self.proj.bias))"),
    "box": ("self.box = Box(real)", "mix(self.box.gate.weight) * self.box.scale"),
    "blocks": (
        "self.blocks = nn.ModuleList([nn.Linear(2, 1, dtype=real), nn.Identity()])",
        "mix(self.blocks[0].weight)",
    ),
    "eps": ("self.eps = 0.25", "self.eps"),
    "count": ("self.count = 3", "self.count"),
    "mode": ("self.mode = 'soft'", "(1 if self.mode == 'soft' else 2)"),
    "pads": ("self.pads = (1, 2.5, 'x')", "self.pads[1]"),
    "config": ("self.config = types.SimpleNamespace(eps=0.5)", "self.config.eps"),
    "everything": ("pass", "sum(mix(p).real for p in self.parameters())"),
    "mode_of": ("pass", "(1 if self.training else 2)"),
}

RESULTS = {  # what a leaf of the output is
    "fresh": "total",
    "other": "total * 2",
    "turned": "turned(total * 3)",
    "narrowed": "narrowed(total)",
    "ended": "ended(total)",
    "summed": "total.sum()",
    "input": "x",
    "view of input": "turned(x)",
    "part of input": "narrowed(x)",
    "state": "self.weight",
    "view of state": "self.weight.expand(2, 3)",
    "integer": "(total.real * 4).to(torch.int64)",
    "conjugate": "torch.complex(total.real.float(), total.real.float()).conj()",
    "imaginary": "torch.complex(total.real.float(), total.real.float()).conj().imag",
    "empty": "total.reshape(-1)[:0]",
}

OUTPUTS = {  # a form, and where its results are in what it gives
    "tensor": ("{}", ("",)),
    "tuple of one": ("({},)", ("[0]",)),
    "tuple": ("({}, {})", ("[0]", "[1]")),
    "list": ("[{}, {}]", ("[0]", "[1]")),
    "dict": ("{{'a': {}, 'b': {}}}", ("['a']", "['b']")),
    "with none": ("({}, None)", ("[0]",)),
    "nested": (
        "{{'a': ({}, [None, {}]), 'b': ({},), 'c': 'text'}}",
        ("['a'][0]", "['a'][1][1]", "['b'][0]"),
    ),
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64)


@dataclass(frozen=True)
class Layer:
    """An extensible layer and a kernel for it."""

    dtype: torch.dtype
    parameters: tuple[str, ...]
    state: tuple[str, ...]
    output: str
    results: tuple[str, ...]
    written: str | None
    """``x``, ``y`` or ``offset``: what is written into."""
    writers: tuple[str, ...]
    """Who does so: ``reference``, ``kernel``, or both."""
    opaque: bool
    """Whether the kernel works on memory, where torch does not see it."""
    source: bool
    """Whether the forwards have a source that can be read."""

    def forward(self, who: str) -> str:
        """The source of the ``forward`` of the ``reference`` or of the ``kernel``."""
        taken = [(name, PARAMETERS[name]) for name in PARAMETERS if name in self.parameters]
        names = [name for name, _ in taken]
        declared = ["self", "x"]
        for name in names:
            if name in KEYWORD_ONLY and "*" not in {d[0] for d in declared}:
                declared.append("*")
            declared.append(PARAMETERS[name][0])
        lines = [f"def forward({', '.join(declared)}):"]
        if who == "kernel" and self.opaque:
            given = ["x", *(name for name in names if name in TENSOR_PARAMETERS)]
            lines += [f"    {name} = natives({name})" for name in given]
        if self.written and who in self.writers:
            target = "self.offset" if self.written == "offset" else self.written
            if who == "kernel" and self.opaque:
                target = f"native({target})"
            lines.append(f"    {target}.mul_(2).add_({10 if who == 'kernel' else 0})")
        lines.append("    total = x * 0.5")
        for _, (_, adds) in taken:
            lines.append(f"    total = total + {adds}")
        for name in self.state:
            lines.append(f"    total = total + {STATE[name][1]}")
        if who == "kernel":
            lines.append("    total = total + 10")
        lines.append("    total = cast(total, x.dtype)")
        leaves = [RESULTS[name] for name in self.results]
        if who == "kernel" and self.opaque:
            leaves = [f"native({leaf})" for leaf in leaves]
        if who == "reference":  # one whose results share memory is kept, and no op runs
            leaves = [f"({leaf}).clone()" for leaf in leaves]
        lines.append(f"    return {OUTPUTS[self.output][0].format(*leaves)}")
        return "\n".join(f"    {line}" for line in lines)

    def text(self) -> str:
        """The source of both classes."""
        made = "\n".join(f"        {STATE[name][0]}" for name in self.state)
        return f"""
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        dtype = {self.dtype}
        real = dtype if dtype.is_floating_point else torch.float32
{made}

{self.forward("reference")}


class Kernel(nn.Module):
{self.forward("kernel")}
"""


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random numbers, small ones."""
    if dtype is torch.int64:
        return torch.randint(-3, 4, shape)
    return torch.randn(shape, dtype=dtype)


def parameter(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(values(dtype, *shape), requires_grad=dtype is not torch.int64)


_count = itertools.count()


def _execute(text: str, name: str, *, source: bool) -> dict[str, Any]:
    """Run the source of a module; where ``source`` is, ``inspect`` finds it."""
    filename = f"<{name} {next(_count)}>"
    if source:
        linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    found = {**globals(), "types": types}
    exec(compile(text, filename, "exec"), found)
    return found


@functools.lru_cache(maxsize=256)
def classes(spec: Layer) -> tuple[type[nn.Module], type[nn.Module], str]:
    """The layer's class, the kernel's, and the name of the layer."""
    found = _execute(spec.text(), "layer", source=spec.source)
    name = f"Random{next(_count)}"
    replace_kernel_forward_from_hub(found["Layer"], name)
    return found["Layer"], found["Kernel"], name


@st.composite
def layers(draw: Callable[[Any], Any]) -> Layer:
    """A layer and a kernel for it."""
    output = draw(st.sampled_from(list(OUTPUTS)))
    results = draw(
        st.lists(
            st.sampled_from(list(RESULTS)),
            min_size=len(OUTPUTS[output][1]),
            max_size=len(OUTPUTS[output][1]),
        )
    )
    parameters = draw(st.lists(st.sampled_from(list(PARAMETERS)), max_size=4, unique=True))
    state = set(draw(st.lists(st.sampled_from(list(STATE)), max_size=4, unique=True)))
    if "tied" in state or any("self.weight" in RESULTS[r] for r in results):
        state.add("weight")
    source = draw(st.booleans())
    if not source or "everything" in state:
        state.discard("config")  # an object that is no module cannot be taken whole
    targets = ["x", *({"y"} & set(parameters)), *({"offset"} & state)]
    written = draw(st.none() | st.sampled_from(targets))
    opaque = draw(st.booleans())
    # What a kernel writes alone must show on fakes.
    writers = [("reference", "kernel"), ("reference",), *([] if opaque else [("kernel",)])]
    return Layer(
        dtype=draw(st.sampled_from(DTYPES)),
        parameters=tuple(name for name in PARAMETERS if name in parameters),
        state=tuple(name for name in STATE if name in state),
        output=output,
        results=tuple(results),
        written=written,
        writers=draw(st.sampled_from(writers)) if written else (),
        opaque=opaque,
        source=source,
    )


# --- models of them -----------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.dtype, int], Tensor]] = {
    "contiguous": lambda dtype, n: values(dtype, n, 3),
    "transposed": lambda dtype, n: values(dtype, 3, n).t(),
    "permuted": lambda dtype, n: values(dtype, 2, n, 3).permute(1, 2, 0),
    "strided": lambda dtype, n: values(dtype, 2 * n, 4)[::2, 1:],
    "expanded": lambda dtype, n: values(dtype, 1, 3).expand(n, 3),
    "row": lambda dtype, n: values(dtype, 3),
    "one": lambda dtype, n: values(dtype, 1, 1),
    "empty": lambda dtype, n: values(dtype, 0, 3),
    "scalar": lambda dtype, n: values(dtype),
}
VIEWS = ("{}", "turned({})", "narrowed({})", "{}.expand(2, *{}.shape)", "{}.detach()")


@dataclass(frozen=True)
class Argument:
    """One of a model's values, by its number among those there are, and a view of it."""

    value: int
    view: str

    def text(self, count: int, dtype: torch.dtype, offset: int = 0) -> str:
        value = f"v{(self.value + offset) % count}"
        return f"cast({self.view.replace('{}', value)}, {dtype})"


@dataclass(frozen=True)
class Made:
    """A call of a layer in a model."""

    layer: int
    x: Argument
    arguments: tuple[tuple[str, Argument], ...]
    """Of the parameters that the layer has, those that are given."""
    positional: bool
    """Whether arguments are given by position, as long as they can be."""
    in_place: bool
    """Whether the model writes into what it gets."""
    autocast: bool


@dataclass(frozen=True)
class Model:
    """A model that calls random layers."""

    layers: tuple[Layer, ...]
    inputs: tuple[tuple[torch.dtype, str], ...]
    calls: tuple[Made, ...]
    training: bool
    """Whether it is made for gradients to flow through it."""

    def text(self) -> str:
        """The source of all of it."""
        parts = [
            spec.text().replace("class Layer", f"class Layer{i}")
            for i, spec in enumerate(self.layers)
        ]
        return "\n".join([*parts, self.forward()])

    def forward(self) -> str:
        """The source of the model's ``forward``."""
        count = len(self.inputs)
        lines = [f"def forward(self, {', '.join(f'i{k}' for k in range(count))}):"]
        for k, (_, layout) in enumerate(self.inputs):
            # Nobody can write into an expanded tensor, nor into one that gradients are wanted of.
            own = ".clone()" if layout == "expanded" else " * 1" if self.training else ""
            written = any(spec.written for spec in self.layers)
            lines.append(f"    v{k} = i{k}{own if written else ''}")
        for made in self.calls:
            spec = self.layers[made.layer % len(self.layers)]
            call = f"self.layers[{made.layer % len(self.layers)}]({self._given(made, spec, count)})"
            indent = "    "
            if made.autocast:
                lines.append("    with torch.autocast('cpu', torch.bfloat16):")
                indent = "        "
            lines.append(f"{indent}r = {call}")
            for path in OUTPUTS[spec.output][1]:
                lines.append(f"    v{count} = r{path}")
                lines += [f"    v{count}.add_(1)"] if made.in_place else []
                count += 1
        lines.append(f"    return [{', '.join(f'v{k}' for k in range(count))}]")
        return "\n".join(lines)

    def _given(self, made: Made, spec: Layer, count: int) -> str:
        arguments = dict(made.arguments)
        x = made.x
        if spec.written or self.training:
            # Operands are values: what is written into one does not show in another. And an op
            # saves them all for its backward, where nobody may write into them any more.
            arguments = {
                name: _writable(a) if name == spec.written else _apart(a)
                for name, a in arguments.items()
            }
            x = _writable(x) if spec.written == "x" else _apart(x)
        given = [x.text(count, spec.dtype)]
        in_position = made.positional or "rest" in arguments
        for name in spec.parameters:
            argument = arguments.get(name)
            if argument is None and (name in REQUIRED or (name != "more" and "rest" in arguments)):
                argument = _apart(x)
            if argument is None:
                in_position = False
                continue
            tensor = argument.text(count, spec.dtype)
            other = argument.text(count, spec.dtype, 1)
            value = {
                "pair": f"({tensor}, 3)",
                "n": f"{tensor}.shape[0] if {tensor}.dim() else 3",
                "alpha": "0.75",
                "flip": "True",
                "how": "'minus'",
                "kind": "torch.float64",
                "size": f"{tensor}.shape",
                "listed": f"[{tensor}, {other}]",
                "named": f"{{'k': {tensor}, 'long': {other}}}",
                "rest": f"{tensor}, {other}",
                "scale": "2.5",
                "more": f"first={tensor}, second={other}",
            }.get(name, tensor)
            by_name = name in KEYWORD_ONLY or not (in_position or name == "rest")
            given.append(value if name in ("rest", "more") or not by_name else f"{name}={value}")
        return ", ".join(given)


def _apart(argument: Argument) -> Argument:
    return Argument(argument.value, f"{argument.view}.clone()")


def _writable(argument: Argument) -> Argument:
    return Argument(argument.value, "{}") if "expand" in argument.view else argument


class Built(nn.Module):
    """A model's layers."""

    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.layers = nn.ModuleList(classes(layer)[0]() for layer in spec.layers)


def build(spec: Model) -> nn.Module:
    """The model, and nothing chosen for its layers yet."""
    forward = _execute(spec.forward(), "model", source=True)["forward"]
    return type("RandomModel", (Built,), {"forward": forward})(spec)


def inputs_of(spec: Model, length: int) -> list[Tensor]:
    """Inputs for it, of which ``length`` is a size."""
    made = [LAYOUTS[layout](dtype, length) for dtype, layout in spec.inputs]
    for tensor in made:
        tensor.requires_grad_(spec.training and tensor.dtype is not torch.int64)
    return made


ARGUMENTS = st.builds(Argument, st.integers(0, 7), st.sampled_from(VIEWS))


@st.composite
def models(draw: Callable[[Any], Any], *, training: bool) -> Model:
    """A model of random layers."""
    own = tuple(draw(st.lists(layers(), min_size=1, max_size=3)))
    calls = []
    for k in range(draw(st.integers(len(own), 4))):
        layer = own[k % len(own)]
        given = [
            (name, draw(ARGUMENTS))
            for name in layer.parameters
            if name in REQUIRED or draw(st.booleans())
        ]
        calls.append(
            Made(
                k % len(own),
                draw(ARGUMENTS),
                tuple(given),
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.sampled_from([False, False, False, True])),
            )
        )
    inputs = st.tuples(st.sampled_from(DTYPES), st.sampled_from(list(LAYOUTS)))
    return Model(own, tuple(draw(st.lists(inputs, min_size=1, max_size=2))), tuple(calls), training)
