"""The arithmetic of layers, each written by several means."""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH = 4
"""The size of the last dimension of all values."""


@dataclass(frozen=True)
class Core:
    """One computation of ``y`` from ``x``, the layer's weights and further arguments.

    All texts are lines of Python. In ``array`` the names stand for arrays, in ``gradient`` for
    tensors without gradients; the latter computes ``g_<name>`` from ``g``, the gradient of ``y``.
    """

    name: str
    reference: str
    otherwise: str
    """The same in torch, by other means."""
    array: str
    gradient: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    """The parameters, by name, with the text that makes them."""
    arguments: dict[str, str] = field(default_factory=dict)
    """The further arguments, with the text that makes each one from ``a``, the first argument."""
    differentiable: tuple[str, ...] = ("x",)
    """The names among arguments and weights that have a gradient."""
    kinds: str = "f"
    """The kinds of values that it takes: f floats, i integers, c complex, b bool."""
    extra: bool = False
    """Whether it computes ``also``, a second result without a gradient."""
    whole: str = ""
    """The lines of a kernel in numpy that uses ``self``, where ``array`` cannot say it."""
    per_sample: bool = True
    """Whether rows of the first dimension do not depend on each other."""


_SUM = "reshape(-1, 4).sum(0)"

AFFINE = Core(
    "affine",
    "y = x * self.weight + self.bias",
    "y = torch.addcmul(self.bias, self.weight, x)",
    "y = weight * x + bias",
    f"g_x = g * weight\ng_weight = (g * x).{_SUM}\ng_bias = g.{_SUM}",
    {"weight": "torch.linspace(0.5, 1.5, 4)", "bias": "torch.linspace(-1, 1, 4)"},
    differentiable=("x", "weight", "bias"),
)
PLAIN = Core(
    "plain",
    "y = x * 3 + 1",
    "y = x + x + x + 1",
    "y = 1 + 3 * x",
    "g_x = g * 3",
    kinds="fic",
)
NORM = Core(
    "norm",
    "y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01) * self.weight",
    "y = self.weight * (x / (x.square().sum(-1, keepdim=True) / 4 + 0.01).sqrt())",
    "y = weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01)",
    "r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)\n"
    "n = x * r\nm = g * weight\n"
    "g_x = r * (m - n * (m * n).mean(-1, keepdim=True))\n"
    f"g_weight = (g * n).{_SUM}",
    {"weight": "torch.linspace(0.5, 1.5, 4)"},
    differentiable=("x", "weight"),
)
GATE = Core(
    "gate",
    "a, b = x.chunk(2, dim=-1)\ny = torch.cat([F.silu(a) * b, a - b], dim=-1)",
    "a, b = x[..., :2], x[..., 2:]\ny = torch.cat([a * b * torch.sigmoid(a), a - b], dim=-1)",
    "a, b = x[..., :2], x[..., 2:]\ny = np.concatenate([a * b / (1 + np.exp(-a)), a - b], -1)",
    "a, b = x.chunk(2, dim=-1)\ng1, g2 = g.chunk(2, dim=-1)\ns = torch.sigmoid(a)\n"
    "g_x = torch.cat([g1 * b * s * (1 + a * (1 - s)) + g2, g1 * a * s - g2], dim=-1)",
)
LINEAR = Core(
    "linear",
    "y = F.linear(x, self.weight, self.bias)",
    "y = torch.addmm(self.bias, x.reshape(-1, 4), self.weight.t()).view(x.shape)",
    "y = x @ weight.T + bias",
    f"g_x = g @ weight\ng_weight = g.reshape(-1, 4).t() @ x.reshape(-1, 4)\ng_bias = g.{_SUM}",
    {"weight": "torch.linspace(-1, 1, 16).view(4, 4)", "bias": "torch.linspace(-1, 1, 4)"},
    differentiable=("x", "weight", "bias"),
)
SOFTMAX = Core(
    "softmax",
    "y = x.softmax(-1)",
    "e = (x - x.amax(-1, keepdim=True).detach()).exp()\ny = e / e.sum(-1, keepdim=True)",
    "e = np.exp(x - x.max(-1, keepdims=True))\ny = e / e.sum(-1, keepdims=True)",
    "y = x.softmax(-1)\ng_x = y * (g - (g * y).sum(-1, keepdim=True))",
)
ROTARY = Core(
    "rotary",
    "y = x * cos + torch.cat([-x[..., 2:], x[..., :2]], dim=-1) * sin",
    "y = torch.cat([x[..., :2] * cos[..., :2] - x[..., 2:] * sin[..., :2],"
    " x[..., 2:] * cos[..., 2:] + x[..., :2] * sin[..., 2:]], dim=-1)",
    "y = x * cos + np.concatenate([-x[..., 2:], x[..., :2]], -1) * sin",
    "h = g * sin\ng_x = g * cos + torch.cat([h[..., 2:], -h[..., :2]], dim=-1)",
    arguments={
        "cos": "torch.arange(a.shape[-2], dtype=a.dtype).unsqueeze(-1).expand(-1, 4).cos()",
        "sin": "torch.arange(a.shape[-2], dtype=a.dtype).unsqueeze(-1).expand(-1, 4).sin()",
    },
)
CUMSUM = Core(
    "cumsum",
    "y = x.cumsum(-2)",
    "y = torch.cumsum(x.transpose(-2, -1), -1).transpose(-2, -1)",
    "y = np.cumsum(x, -2)",
    "g_x = g.flip(-2).cumsum(-2).flip(-2)",
    kinds="fic",
)
LOOKUP = Core(
    "lookup",
    "y = x + F.embedding(index, self.weight)",
    "y = self.weight[index] + x",
    "y = x + weight[index]",
    "g_x = g\ng_weight = torch.zeros_like(weight).index_add_("
    "0, index.reshape(-1), g.reshape(-1, 4))",
    {"weight": "torch.linspace(-1, 1, 12).view(3, 4)"},
    {"index": "torch.arange(a.shape[0] * a.shape[1]).view(a.shape[:2]) % 3"},
    differentiable=("x", "weight"),
    per_sample=False,
)
MASKED = Core(
    "masked",
    "y = x.masked_fill(mask, 2)",
    "y = torch.where(mask, torch.full_like(x, 2), x)",
    "y = np.where(mask, np.asarray(2, x.dtype), x)",
    "g_x = g * ~mask",
    arguments={"mask": "torch.arange(a.shape[-2]).unsqueeze(-1) % 2 == 1"},
    kinds="fic",
)
ADD = Core(
    "add",
    "y = x + other * 2",
    "y = torch.add(x, other, alpha=2)",
    "y = other + other + x",
    "g_x = g\ng_other = (2 * g).sum_to_size(other.shape)",
    arguments={"other": "a[:1] * 2"},
    differentiable=("x", "other"),
    kinds="fic",
    per_sample=False,
)
MIX = Core(
    "mix",
    "y = x - other",
    "y = torch.neg(other - x)",
    "y = -other + x",
    "g_x = g\ng_other = -g",
    arguments={"other": "a"},  # the same tensor twice
    differentiable=("x", "other"),
    kinds="fic",
)
PHASE = Core(
    "phase",
    "y = torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2).float())"
    " * phase).flatten(-2).to(x.dtype)",
    "a, b = x[..., 0::2], x[..., 1::2]\n"
    "y = torch.stack([a * phase.real - b * phase.imag, a * phase.imag + b * phase.real], -1)"
    ".flatten(-2).to(x.dtype)",
    "c = (x[..., 0::2] + 1j * x[..., 1::2]) * phase\n"
    "y = np.stack([c.real, c.imag], -1).reshape(x.shape)",
    "a, b = g[..., 0::2], g[..., 1::2]\n"
    "g_x = torch.stack([a * phase.real + b * phase.imag, b * phase.real - a * phase.imag], -1)"
    ".flatten(-2).to(g.dtype)",
    arguments={"phase": "torch.polar(torch.ones(2), torch.tensor([0.5, 1.0]))"},
)
POOL = Core(
    "pool",
    "y = x.sum(-2, keepdim=True)",
    "y = torch.einsum('...sd->...d', x).unsqueeze(-2)",
    "y = x.sum(-2, keepdims=True)",
    "g_x = g.expand(x.shape)",
    kinds="fic",
)
ROUTE = Core(
    "route",
    "m, also = x.max(-1, keepdim=True)\ny = x - m",
    "also = x.argmax(-1, keepdim=True)\ny = x - x.gather(-1, also)",
    "also = x.argmax(-1)[..., None]\ny = x - np.take_along_axis(x, also, -1)",
    "also = x.argmax(-1, keepdim=True)\ng_x = g.scatter_add(-1, also, -g.sum(-1, keepdim=True))",
    kinds="i4",
    extra=True,
)
COMPARE = Core(
    "compare",
    "also = x > 0\ny = x.abs()",
    "also = x.gt(0)\ny = torch.where(also, x, -x)",
    "also = x > 0\ny = np.abs(x)",
    "g_x = g * x.sign()",
    kinds="i4",
    extra=True,
)
BATCH_NORM = Core(
    "batch_norm",
    "y = F.batch_norm(x.reshape(-1, 4), self.mean, self.var, self.weight, None,"
    " self.training, 0.1).view(x.shape)",
    "flat = x.reshape(-1, 4)\n"
    "if self.training and len(flat):\n"
    "    m, v = flat.mean(0), flat.var(0, unbiased=False)\n"
    "    with torch.no_grad():\n"
    "        self.mean.mul_(0.9).add_(0.1 * m)\n"
    "        self.var.mul_(0.9).add_(0.1 * flat.var(0))\n"
    "else:\n"
    "    m, v = self.mean.clone(), self.var.clone()\n"
    "y = (x - m) / (v + 1e-5).sqrt() * self.weight",
    "",
    weights={"weight": "torch.linspace(0.5, 1.5, 4)"},
    whole="flat = to_array(x).reshape(-1, 4)\n"
    "mean, var = self.mean.numpy(), self.var.numpy()\n"
    "m, v = mean, var\n"
    "if self.training and len(flat):\n"
    "    m, v = flat.mean(0), flat.var(0)\n"
    "    mean[...] = mean * 0.9 + m * 0.1\n"
    "    var[...] = var * 0.9 + flat.var(0, ddof=1) * 0.1\n"
    "w = to_array(self.weight)\n"
    "y = to_tensor((to_array(x) - m) / np.sqrt(v + 1e-5) * w, x.dtype)",
    differentiable=("x", "weight"),
    kinds="4",
    per_sample=False,
)
NESTED = Core(
    "nested",
    "y = self.inner(x) * self.weight",
    "y = self.weight * self.inner(x)",
    "",
    weights={"weight": "torch.linspace(0.5, 1.5, 4)"},
    whole="y = to_tensor(to_array(self.inner(x)) * to_array(self.weight), x.dtype)",
    differentiable=("x", "weight"),
)
BUFFERED = Core(
    "buffered",
    "y = x @ (self.packed.to(x.dtype) * 0.5)",
    "y = torch.einsum('...d,de->...e', x, self.packed.to(x.dtype)) / 2",
    "",
    whole="y = to_tensor(to_array(x) @ self.packed.numpy().astype('float32') / 2, x.dtype)",
)

CORES = (
    AFFINE,
    PLAIN,
    NORM,
    GATE,
    LINEAR,
    SOFTMAX,
    ROTARY,
    CUMSUM,
    LOOKUP,
    MASKED,
    ADD,
    MIX,
    PHASE,
    POOL,
    ROUTE,
    COMPARE,
    BATCH_NORM,
    NESTED,
    BUFFERED,
)


def cores_for(dtype: str) -> list[Core]:
    """Return the cores that compute with values of a dtype."""
    kinds = {"float32": "f4", "float64": "f4", "bfloat16": "f", "int64": "i", "complex64": "c"}
    return [core for core in CORES if set(core.kinds) & set(kinds[dtype])]
