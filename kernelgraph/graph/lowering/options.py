"""The options of ``torch.compile(..., backend="hubkernels", options={...})``, checked."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from kernelgraph.graph import _torch
from kernelgraph.kernel import Gradients
from kernelgraph.selection import Mode, serving_modes

Compiler = Callable[[fx.GraphModule, list[object]], Any]
"""Compiles a graph for example inputs into a function, as backends of ``torch.compile`` do."""

InductorOptions = Mapping[str, Any]
"""Options of Inductor, as ``torch.compile`` takes them."""


class Policy(str, enum.Enum):
    """The rule that says which of the kernels for a layer are used."""

    FASTEST = "fastest"
    """A kernel where it is measured to be faster than the layer."""
    ALWAYS = "always"
    """A kernel wherever there is one."""
    NEVER = "never"
    """No kernel."""


MEASURE_SECONDS = 30.0
INNER = ("inductor", "aot_eager", "eager")
_FLAGS = {"verify": False, "own_backward": True}
_OWN = (
    "policy, measure_seconds, inner, kernel_mode, verify, verify_gradients, wrong_gradient "
    "and own_backward"
)
"""The names of hubkernels' own options, for error messages."""
_GRAPH_CUTS = "custom_should_partition_ops"
"""Inductor's option for the ops that are not to be in a CUDA graph."""


@dataclass(frozen=True)
class Options:
    """The backend's options, checked.

    `kernelgraph.graph.compile.backend.hubkernels` documents each of them; the fields have the
    options' names where nothing else is said. The defaults here are those of `rewrite`, of exports
    and of other backends, where nothing is measured. `parse` has the defaults of the backend.
    """

    policy: Policy = Policy.ALWAYS
    inner: str | Compiler = "inductor"
    kernel_mode: Mode | None = None
    inductor: InductorOptions = field(default_factory=dict)
    """Inductor's own options."""
    inductor_mode: str | None = None
    """``mode=`` of torch.compile, which is Inductor's."""
    verify: bool = False
    gradients: Gradients = Gradients()  # noqa: RUF009 (a tuple)
    """The options ``verify_gradients`` and ``wrong_gradient``."""
    own_backward: bool = True
    measure_seconds: float = MEASURE_SECONDS

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, object] | None = None) -> Options:
        """Check what ``torch.compile`` was given.

        Args:
            mode: Its argument ``mode``.
            options: Its argument ``options``, which is not changed.

        Raises:
            ValueError: If an option is unknown or has a value that it cannot have.
            TypeError: If a value is of the wrong type.
        """
        given = dict(options or {})
        for name in given:
            if not isinstance(name, str):
                raise TypeError(f"the name of an option is a string, not {name!r}")
        policy = _policy(given)
        seconds = _measure_seconds(given)
        inner = _inner(given)
        kernel_mode = _kernel_mode(given)
        gradients = Gradients.parse(
            given.pop("verify_gradients", True), given.pop("wrong_gradient", "recompute")
        )
        flags = {name: _flag(given, name) for name in _FLAGS}
        _check_inductor_options(given, mode, inner)
        return cls(
            policy,
            inner,
            kernel_mode,
            given,
            mode,
            gradients=gradients,
            measure_seconds=seconds,
            **flags,
        )

    @property
    def cuda_graphs(self) -> bool:
        """Whether Inductor makes CUDA graphs."""
        if "triton.cudagraphs" in self.inductor:
            return bool(self.inductor["triton.cudagraphs"])
        return self.inductor_mode in ("reduce-overhead", "max-autotune")

    def cutting_around(self, ops: Sequence[str]) -> Options:
        """Return the same options, but with CUDA graphs cut around some ops."""
        if not ops:
            return self
        cuts = [*self.inductor.get(_GRAPH_CUTS, ()), *ops]
        return replace(self, inductor={**self.inductor, _GRAPH_CUTS: cuts})

    def without_cuda_graphs(self) -> Options:
        """Return the same options, but without CUDA graphs."""
        without = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
        inductor = {k: v for k, v in self.inductor.items() if k != "triton.cudagraphs"}
        mode = without.get(self.inductor_mode or "", self.inductor_mode)
        return replace(self, inductor=inductor, inductor_mode=mode)


def options_of_backend(backend: Callable[..., object], kwargs: Mapping[str, Any]) -> Options | None:
    """Return the options that a graph is traced with; None if the backend is not hubkernels.

    Args:
        backend: The backend that will get the graph.
        kwargs: The keyword arguments that ``torch.compile`` passes to it.
    """
    if getattr(backend, "is_hubkernels", False):
        return Options.parse(kwargs.get("mode"), kwargs.get("options"))
    return None


# --- single options: each is taken out of what was given, and checked ---------------------------


def _policy(given: dict[str, object]) -> Policy:
    if "policy" in given:
        where, policy = "option policy", given.pop("policy")
    else:
        where, policy = "KERNELGRAPH_POLICY", os.environ.get("KERNELGRAPH_POLICY") or "fastest"
    try:
        return Policy(policy)
    except ValueError:
        raise ValueError(f"{where} is one of {', '.join(Policy)}, not {policy!r}") from None


def _measure_seconds(given: dict[str, object]) -> float:
    seconds = given.pop("measure_seconds", MEASURE_SECONDS)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"option measure_seconds is a number, not {seconds!r}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"option measure_seconds is a number from 0 on, not {seconds!r}")
    return float(seconds)


def _inner(given: dict[str, object]) -> str | Compiler:
    inner = given.pop("inner", "inductor")
    if callable(inner):
        return inner
    if isinstance(inner, str) and inner in INNER:
        return inner
    raise ValueError(
        f"option inner is one of {', '.join(INNER)} or a callable that takes a graph "
        f"module and example inputs, not {inner!r}"
    )


def _kernel_mode(given: dict[str, object]) -> Mode | None:
    mode = given.pop("kernel_mode", None)
    if mode is None:
        return None
    try:
        parsed = Mode.parse(mode)
    except TypeError:
        raise TypeError(f"option kernel_mode is a kernelgraph.Mode, not {mode!r}") from None
    serving_modes(parsed)
    return parsed | Mode.TORCH_COMPILE


def _flag(given: dict[str, object], name: str) -> bool:
    value = given.pop(name, _FLAGS[name])
    if not isinstance(value, bool):
        raise TypeError(f"option {name} is a bool, not {value!r}")
    return value


def _check_inductor_options(
    given: Mapping[str, object], mode: str | None, inner: str | Compiler
) -> None:
    """Check the options that are left once hubkernels' own are taken out."""
    if inner != "inductor":
        # "default" is what torch.compile means by no mode.
        if given or mode not in (None, "default"):
            what = ", ".join([*sorted(given), *([f"mode={mode!r}"] if mode else [])])
            raise ValueError(
                f"{what}: not an option of hubkernels ({_OWN}), and Inductor's do not go with "
                f"inner={inner!r}"
            )
        return
    known = _torch.inductor_options()
    if unknown := sorted(k for k in given if k.replace("-", "_") not in known):
        raise ValueError(
            f"unknown option {', '.join(unknown)}: neither one of hubkernels ({_OWN}) nor one of "
            "Inductor's (torch._inductor.list_options())"
        )
