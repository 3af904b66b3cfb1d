"""Random extensible layers and right kernels for them, as source text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from random import Random

from tests.equivalence.cores import BATCH_NORM, BUFFERED, LINEAR, NESTED, Core, cores_for

FORMS = {
    "tensor": "y",
    "tuple": "y, {also}",
    "list": "[y, {also}]",
    "dict": '{{"y": y, "also": {also}}}',
    "pair": "Pair(y, {also})",
    "both": "Both(y, {also})",
    "holed": "y, None",
    "view": "y[..., :]",
    "strided": "y.transpose(-3, -2).contiguous().transpose(-3, -2)",
    "narrow": "torch.cat([y, y], -1)[..., :4]",
    "with_argument": "y, x",
    "with_view": "y, x[..., :2]",
    "argument": "x",
    "nothing": "None",
}
STYLES = ("numpy", "function", "torch", "no_grad", "regrad", "rerun")
WRITES = ("", "in_place", "transposed", "scratch", "out", "cache", "outs", "box")


@dataclass(frozen=True)
class Layer:
    """One random layer: what is drawn for it. `reference` and `kernel` are its source text."""

    name: str
    core: Core
    style: str
    """How the kernel computes."""
    form: str
    """What it returns."""
    write: str
    """What it writes into."""
    features: frozenset[str]
    """What else the layer does."""
    quirks: frozenset[str]
    """What else the kernel does."""

    @property
    def parameters(self) -> list[str]:
        """The parameters of the forward, after ``self``."""
        names = ["x", *self.core.arguments]
        names += [self.write] if self.write in ("out", "cache", "outs", "box") else []
        gain = ["*", "gain=1.0"] if "keyword" in self.features else ["gain=1.0"]
        return names + (gain if {"gain", "keyword"} & self.features else [])

    @property
    def is_pure(self) -> bool:
        """Whether the layer takes and returns one tensor and leaves nothing behind."""
        kept = {"scale", "factors", "gain", "keyword"}
        return (
            self.form in ("tensor", "strided", "narrow", "view")
            and self.write in ("", "scratch")
            and self.features <= kept
            and self.core not in (BATCH_NORM, NESTED)
        )

    def reference(self) -> str:
        """Return the class of the layer."""
        core = self.core
        lines = ["super().__init__()"]
        lines += [f"self.{name} = nn.Parameter({made})" for name, made in core.weights.items()]
        buffers = {"steps": "torch.zeros(())"} if "steps" in self.features else {}
        buffers |= {"last": "torch.zeros(4)"} if "last" in self.features else {}
        if core is BATCH_NORM:
            buffers |= {"mean": "torch.zeros(4)", "var": "torch.ones(4)"}
        if core is BUFFERED:
            buffers["packed"] = "torch.arange(-8, 8, dtype=torch.int8).view(4, 4)"
        lines += [f'self.register_buffer("{name}", {made})' for name, made in buffers.items()]
        lines += ["self.inner = Inner()"] if core is NESTED else []
        plain = {"scale": "1.5", "factors": "[0.5, 2.0]", "n_calls": "0"}
        lines += [f"self.{name} = {v}" for name, v in plain.items() if name in self.features]
        init = f"def __init__(self):\n{_indented(lines)}"
        forward = (
            f"def forward({', '.join(['self', *self.parameters])}):\n{_indented(self._body())}"
        )
        total = ["total = 0"] if "total" in self.features else []
        return f"class {self.name}(nn.Module):\n{_indented([*total, init, forward])}"

    def _body(self) -> list[str]:
        lines = ["self.n_calls += 1"] if "n_calls" in self.features else []
        lines += [f"{self.name}.total += 1"] if "total" in self.features else []
        lines += ["self.steps.add_(1)"] if "steps" in self.features else []
        lines += ["x.add_(1)"] if self.write == "in_place" else []
        lines += ["x.t_()"] if self.write == "transposed" else []
        lines += [self.core.reference, *self._post()]
        if "dropout" in self.features:
            lines.append("y = F.dropout(y.contiguous(), 0.5, self.training)")
        lines += ["y = y + torch.rand(y.shape, dtype=y.dtype)"] if "noise" in self.features else []
        return lines + self._end()

    def _post(self) -> list[str]:
        lines = ["y = y * self.scale"] if "scale" in self.features else []
        lines += ["y = y * self.factors[0]"] if "factors" in self.features else []
        lines += ["y = y * gain"] if {"gain", "keyword"} & self.features else []
        if "last" in self.features:
            lines.append("self.last.mul_(0.5).add_(y.detach().reshape(-1, 4).sum(0))")
        return lines

    def _end(self) -> list[str]:
        also = "also" if self.core.extra else "y * 2"
        lines = ["out.copy_(y)"] if self.write == "out" else []
        lines += ['cache["n"] = cache.get("n", 0) + 1', 'cache["k"] = y'] * (self.write == "cache")
        lines += ["outs.append(y)"] if self.write == "outs" else []
        lines += ["box.first = y"] if self.write == "box" else []
        lines += ["x.copy_(y)"] if self.form == "argument" else []
        return [*lines, f"return {FORMS[self.form].format(also=also)}"]

    def kernel(self) -> str:
        """Return the class of the kernel, with the functions that it calls."""
        parts = [self._function()] if self.style in ("function", "regrad", "rerun") else []
        parts += [self._arrays()] if self.style in ("numpy", "function") and self.core.array else []
        if "table" in self.quirks:
            parts.append(
                f"@functools.lru_cache\ndef table_{self.name}(size):\n"
                "    return torch.zeros(size, 1, dtype=torch.int64)"
            )
        parts += [f"work_{self.name} = []"] if "workspace" in self.quirks else []
        members = ["can_torch_compile = True"] if "traceable" in self.quirks else []
        members += ["has_backward = False"] if "says" in self.quirks else []
        names = ", ".join(["self", *self.parameters])
        body = self._kernel_body()
        if "renamed" in self.quirks:
            names, body = names.replace("x", "hidden", 1), ["x = hidden", *body]
        members.append(f"def forward({names}):\n{_indented(body)}")
        parts.append(f"class Kernel{self.name}(nn.Module):\n{_indented(members)}")
        return "\n\n".join(parts)

    def _kernel_body(self) -> list[str]:
        lines = [f"{self.name}.total += 1"] if "total" in self.features else []
        lines += ["self.n_calls = self.n_calls + 1"] if "n_calls" in self.features else []
        if "steps" in self.features:
            lines.append(
                "self.steps.numpy()[...] += 1" if self.style == "numpy" else "self.steps += 1"
            )
        lines += ["x -= -1"] if self.write == "in_place" else []
        lines += ["x.t_()"] if self.write == "transposed" else []
        lines += self._computed()
        lines += self._scratch() if self.write == "scratch" else []
        if "table" in self.quirks:
            lines.append(f"y = y + table_{self.name}(y.shape[-2]).to(y.dtype)")
        if "workspace" in self.quirks:
            lines.append(f"if not work_{self.name}:\n    work_{self.name}.append(torch.zeros(4))")
            lines.append(f"y = y + work_{self.name}[0].to(y.dtype)")
        lines += self._post()
        if "dropout" in self.features:
            drawn = "torch.empty(y.shape, dtype=y.dtype).bernoulli_(0.5)"
            lines.append(f"if self.training:\n    y = y * 2 * {drawn}")
        if "noise" in self.features:
            lines.append("y = y + torch.empty(y.shape, dtype=y.dtype).uniform_()")
        lines += ["y = y.clone()"] if "copied" in self.quirks else []
        turned = "y = y.transpose(-3, -2).clone().transpose(-3, -2)"
        lines += [f"if y.dim() > 2:\n    {turned}"] if "strides" in self.quirks else []
        return lines + self._end()

    def _computed(self) -> list[str]:
        """Return the lines that compute ``y``, and ``also``."""
        core, results = self.core, "y, also" if self.core.extra else "y"
        weights = [f"self.{name}" for name in core.weights]
        if self.style == "numpy":
            if not core.array:
                return [core.whole]
            given = ", ".join(f"to_array({v})" for v in ["x", *core.arguments, *weights])
            lines = [f"{results} = arrays_{self.name}({given})", "y = to_tensor(y, x.dtype)"]
            lines += ["also = torch.from_numpy(also)"] if core.extra else []
            return [*lines, *self._autocast()]
        if self.style == "torch":
            return [core.otherwise]
        if self.style == "no_grad":
            return [f"with torch.no_grad():\n{_indented([core.otherwise])}"]
        given = ", ".join(["self", "x", *core.arguments, *weights])
        return [f"{results} = Function{self.name}.apply({given})"]

    def _autocast(self) -> list[str]:
        cast = "if torch.is_autocast_enabled('cpu'):\n    y = y.to(torch.get_autocast_dtype('cpu'))"
        return [cast] if self.core is LINEAR and "bf16" not in self.quirks else []

    def _scratch(self) -> list[str]:
        if self.style == "numpy" and "bf16" not in self.quirks:
            return ["x.detach().numpy()[...] = 0"]
        return ["with torch.no_grad():\n    x.detach().zero_()"]

    def _arrays(self) -> str:
        names = ", ".join(["x", *self.core.arguments, *self.core.weights])
        results = "y, also" if self.core.extra else "y"
        body = _indented([self.core.array, f"return {results}"])
        return f"def arrays_{self.name}({names}):\n{body}"

    def _function(self) -> str:
        """Return an autograd.Function with a backward of its own."""
        core = self.core
        names = ["x", *core.arguments, *core.weights]
        results = "y, also" if core.extra else "y"
        given = ", ".join(names)
        plain = core.reference.replace("self.weight", "weight").replace("self.bias", "bias")
        forward = [f"ctx.save_for_backward({given})", "ctx.module = module"]
        if self.style == "function":
            arrays = ", ".join(f"to_array({v})" for v in names)
            forward += [f"{results} = arrays_{self.name}({arrays})", "y = to_tensor(y, x.dtype)"]
            forward += ["also = torch.from_numpy(also)"] if core.extra else []
        else:
            forward += [plain]
        forward += ["ctx.mark_non_differentiable(also)"] if core.extra else []
        forward.append(f"return {results}")
        backward = [f"{given}, = ctx.saved_tensors"]
        wanted = core.differentiable
        if self.style == "function":
            backward.append(core.gradient)
        else:
            backward += [f"{name} = {name}.detach().requires_grad_()" for name in wanted]
            run = [plain]
            if self.style == "rerun" and core.weights:
                run = [core.reference.replace("self.", "ctx.module.")]
                backward += [
                    f"{name} = ctx.module.{name}" for name in wanted if name in core.weights
                ]
                backward += [
                    f"if not {name}.requires_grad:\n    {name} = {name}.detach().requires_grad_()"
                    for name in wanted
                    if name in core.weights
                ]
            grads = ", ".join(f"g_{name}" for name in wanted)
            run.append(
                f"{grads}, = torch.autograd.grad(y, ({', '.join(wanted)},), g, "
                "allow_unused=True, materialize_grads=True)"
            )
            backward.append(f"with torch.enable_grad():\n{_indented(run)}")
        given_back = ["None", *(f"g_{n}" if n in wanted else "None" for n in names)]
        backward.append(f"return {', '.join(given_back)}")
        gradients = "g, _" if core.extra else "g"
        methods = [
            f"@staticmethod\ndef forward(ctx, module, {given}):\n{_indented(forward)}",
            f"@staticmethod\ndef backward(ctx, {gradients}):\n{_indented(backward)}",
        ]
        return f"class Function{self.name}(torch.autograd.Function):\n{_indented(methods)}"


def draw_layer(rng: Random, name: str, dtype: str) -> Layer:
    """Draw one layer and its kernel for values of a dtype."""
    core = rng.choice(cores_for(dtype))
    styles = [style for style in STYLES if _can(style, core, dtype)]
    style = rng.choice(styles)
    write = rng.choice(WRITES) if rng.random() < 0.35 else ""
    if write == "transposed":
        write = "in_place"  # values have three dimensions; see `programs` for matrices
    forms = list(FORMS) if write in ("out", "cache", "outs", "box") else list(FORMS)[:-1]
    form = rng.choice(forms) if rng.random() < 0.5 else "tensor"
    if write == "scratch" and style not in ("numpy", "no_grad"):
        write = ""  # what autograd saved must not be written
    if write == "scratch" and form in ("argument", "with_argument", "with_view"):
        form = "tensor"
    if core.name == "pool" and form == "argument":
        form = "tensor"
    chances = {"scale": 0.25, "factors": 0.12, "gain": 0.12, "keyword": 0.12, "n_calls": 0.1}
    chances |= {"total": 0.04, "steps": 0.1, "last": 0.08, "dropout": 0.1, "noise": 0.06}
    features = {feature for feature, chance in chances.items() if rng.random() < chance}
    floats = dtype in ("float32", "float64")
    features -= set() if floats else {"last", "dropout", "noise", "steps"}
    features -= {"scale", "factors", "gain", "keyword"} if dtype == "int64" else set()
    features -= {"gain"} if "keyword" in features else set()
    own = {"renamed": 0.06, "table": 0.08, "workspace": 0.06, "copied": 0.08, "strides": 0.08}
    own |= {"traceable": 0.3 if style in ("torch", "no_grad") else 0.0}
    own |= {"says": 0.3 if style in ("numpy", "no_grad") else 0.0}
    quirks = {quirk for quirk, chance in own.items() if rng.random() < chance}
    quirks -= {"table", "workspace"} if dtype == "int64" and style == "torch" else set()
    quirks |= {"bf16"} if dtype == "bfloat16" else set()
    quirks -= {"table", "workspace"} & quirks if "traceable" in quirks else set()
    return Layer(name, core, style, form, write, frozenset(features), frozenset(quirks))


def _can(style: str, core: Core, dtype: str) -> bool:
    """Whether a kernel for this core can be written in this style."""
    if style == "numpy":
        return bool(core.array or core.whole)
    if style == "function":
        return bool(core.array and core.gradient) and not dtype.startswith("complex")
    if style in ("regrad", "rerun"):
        return core not in (BATCH_NORM, NESTED, BUFFERED) and dtype[:5] in ("float", "bfloa")
    return True


def _indented(parts: list[str]) -> str:
    return textwrap.indent("\n".join(parts), "    ")
