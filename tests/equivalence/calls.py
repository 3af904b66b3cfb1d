"""Random calls of a layer in a model, as source text."""

from __future__ import annotations

import textwrap
from random import Random

from tests.equivalence.cores import BATCH_NORM, BUFFERED, LINEAR, LOOKUP, MIX
from tests.equivalence.layers import Layer

_VIEWS = {
    # name: (the argument, the value after the call)
    "same": ("h", "y"),
    "clone": ("h.clone()", "y"),
    "transposed": ("h.transpose(0, 1)", "y.transpose(0, 1)"),
    "strided": ("h.transpose(1, 2).contiguous().transpose(1, 2)", "y"),
    "sliced": ("h[:, ::2]", "y"),
    "tail": ("h[1:]", "torch.cat([h[:1], y])"),
    "expanded": ("h[:1].expand(h.shape)", "h + y"),
    "detached": ("h.detach()", "h + y"),
    "wide": ("torch.cat([h, h], -1)[..., :4]", "y"),
    "four": ("h.unsqueeze(1)", "y.squeeze(1)"),
    "flat": ("h.reshape(1, -1, 4)", "y.reshape(h.shape)"),
    "empty": ("h[:0]", "torch.cat([y, h])"),
}
_PARTS = {
    "tensor": "y = {call}",
    "view": "y = {call}",
    "strided": "y = {call}",
    "narrow": "y = {call}",
    "argument": "y = {call}",
    "tuple": "y, also = {call}",
    "list": "y, also = {call}",
    "dict": 'd = {call}\ny, also = d["y"], d["also"]',
    "pair": "p = {call}\ny, also = p.first, p.second",
    "both": "p = {call}\ny, also = p.first, p[1]",
    "holed": "y, _ = {call}",
    "with_argument": "y, v = {call}",
    "with_view": "y, v = {call}",
    "nothing": "{call}",
}
_TRANSFORMS = {
    "grad": "y = torch.func.grad(lambda v: {call}.sum())(a)",
    "jvp": "y = torch.func.jvp(lambda v: {call}, (a,), (torch.ones_like(a),))[1]",
    "vmap": "y = torch.vmap(lambda v: {call})(a)",
    "ensemble": "y = torch.vmap(lambda v: {call})(torch.stack([a, a + 1])).sum(0)",
}


def draw_call(
    rng: Random, layer: Layer, number: int, dtype: str, container: str
) -> tuple[list[str], list[str]]:
    """Return the lines of a call that computes ``h`` from ``h``, and the names of other results."""
    floats = dtype in ("float32", "float64", "bfloat16")
    view = rng.choice(list(_VIEWS)) if rng.random() < 0.6 else "same"
    if layer.core is LOOKUP and view in ("four",):
        view = "same"
    argument, after = _VIEWS[view]
    lines, given = _arguments(rng, layer, container)
    lines = [f"a = {argument}", *_settings(rng, layer), *lines]
    name = f"self.{layer.name.lower()}"
    around = _around(rng, layer, dtype)
    if around in _TRANSFORMS:
        inner = ["v", *given[1:]]
        if layer.core is MIX:
            inner[1] = "v"
        lines.append(_TRANSFORMS[around].format(call=f"{name}({', '.join(inner)})"))
    else:
        lines += _plain_call(layer, around, name, given)
    results: list[str] = []
    names = ["also"] if "also" in _PARTS[layer.form] and around not in _TRANSFORMS else []
    if names and rng.random() < 0.5:
        lines.append(f"also{number} = also")
        results.append(f"also{number}")
    if layer.form in ("with_argument", "with_view"):
        lines += ["v.add_(1)"] if rng.random() < 0.4 else [f"v{number} = v"]
        results += [] if lines[-1] == "v.add_(1)" else [f"v{number}"]
    lines += _writes(rng)
    lines += _views(rng, layer, around)
    if layer.core.name == "pool" and around in ("", "no_grad", "autocast", "checkpoint"):
        lines.append("y = a + y")
    if view == "sliced" and around in _TRANSFORMS and layer.core.name == "pool" and not floats:
        lines.append("y = a + y")
    if around in ("jvp", "vmap", "ensemble") and layer.core.name == "pool":
        lines.append("y = a + y")
    if around == "autocast":
        lines.append("y = y.to(h.dtype)")
    return [*lines, f"h = {after}"], results


def _arguments(rng: Random, layer: Layer, container: str) -> tuple[list[str], list[str]]:
    """Return lines that make the arguments of a call, and the arguments."""
    lines = [f"{name} = {made}" for name, made in layer.core.arguments.items()]
    given = ["a", *layer.core.arguments]
    if layer.write == "out":
        made = "torch.zeros_like(a)"
        if layer.core.name == "pool":
            made = "torch.zeros_like(a.sum(-2, keepdim=True))"
        made = rng.choice((made, f"torch.cat([{made}, {made}], -1)[..., 4:]"))
        lines.append(f"out = {made}")
        given.append("out")
    elif layer.write in ("cache", "outs", "box"):
        new = {"cache": "{}", "outs": "[]", "box": "Pair()"}[layer.write]
        lines += [] if container == layer.write else [f"{layer.write} = {new}"]
        given.append(layer.write)
    if {"gain", "keyword"} & layer.features and rng.random() < 0.7:
        gain = rng.choice(("2.0", "0.5", "3", "1.0"))
        positional = "gain" in layer.features and rng.random() < 0.5
        given.append(gain if positional else f"gain={gain}")
    elif layer.core.arguments and layer.write == "" and rng.random() < 0.2:
        given = [given[0], *(f"{name}={name}" for name in given[1:])]
    return lines, given


def _settings(rng: Random, layer: Layer) -> list[str]:
    """Return lines that change the layer before the call."""
    me, lines = f"self.{layer.name.lower()}", []
    if "scale" in layer.features and rng.random() < 0.4:
        lines.append(rng.choice((f"{me}.scale = 5.0", f"{me}.scale += 0.5")))
    if "factors" in layer.features and rng.random() < 0.4:
        lines.append(rng.choice((f"{me}.factors[0] = 3.0", f"{me}.factors = [0.25]")))
    if ("dropout" in layer.features or layer.core is BATCH_NORM) and rng.random() < 0.3:
        lines.append(rng.choice((f"{me}.eval()", f"{me}.training = False")))
    return lines


def _around(rng: Random, layer: Layer, dtype: str) -> str:
    """Return the name of what is around the call; empty for nothing."""
    if rng.random() < 0.65:
        return ""
    choices = ["no_grad"]
    casts = layer.core is not LINEAR or layer.style in ("torch", "no_grad", "numpy")
    if dtype == "float32" and layer.core is not BUFFERED and casts:
        choices.append("autocast")
    if layer.write == "" and layer.form in ("tensor", "tuple", "strided"):
        choices.append("checkpoint")
    if layer.is_pure:
        choices += ["vmap", "ensemble"] if layer.core.per_sample else []
        choices += ["grad", "jvp"] if dtype in ("float32", "float64") else []
    return rng.choice(choices)


def _plain_call(layer: Layer, around: str, name: str, given: list[str]) -> list[str]:
    call = f"{name}({', '.join(given)})"
    if around == "checkpoint":
        call = f"checkpoint({', '.join([name, *given])}, use_reentrant=False)"
    taken = {"out": "y = out", "cache": 'y = cache["k"]', "outs": "y = outs[-1]"}
    lines = [_PARTS[layer.form].format(call=call)]
    if layer.form == "nothing":
        lines.append(taken.get(layer.write, "y = box.first"))
    heads = {"no_grad": "with torch.no_grad():", "autocast": 'with torch.autocast("cpu"):'}
    if around in heads:
        lines = [f"{heads[around]}\n{textwrap.indent(chr(10).join(lines), '    ')}"]
    return lines


def _writes(rng: Random) -> list[str]:
    """Return lines that write into a result or an argument after the call."""
    lines = ["y.add_(1)"] if rng.random() < 0.12 else []
    lines += ["y[..., 0] = 0"] if rng.random() < 0.05 else []
    return lines + (["a.mul_(2)"] if rng.random() < 0.1 else [])


def _views(rng: Random, layer: Layer, around: str) -> list[str]:
    """Return lines that need the strides that the reference's result has."""
    if around in _TRANSFORMS or rng.random() < 0.6:
        return []
    if layer.form == "strided":
        return [
            "y = y.transpose(-3, -2).view(-1, y.shape[-3] * y.shape[-1]).view("
            "*y.shape[:-3], y.shape[-2], y.shape[-3], y.shape[-1]).transpose(-3, -2)"
        ]
    return ["y = y.view(-1, 4).view(y.shape)"] if rng.random() < 0.4 else []
