"""The options of ``torch.compile(..., backend="hubkernels", options={...})``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kernelgraph.graph import _torch
from kernelgraph.kernel import Gradients
from kernelgraph.selection import Mode, tried

POLICIES = ("fastest", "always", "never")
MEASURE_SECONDS = 30.0
INNER = ("inductor", "aot_eager", "eager")
_FLAGS = {"verify": False, "own_backward": True}


@dataclass(frozen=True)
class Options:
    """The backend's options, checked."""

    policy: str = "always"
    """``fastest``: what is measured to be so where it stands; ``always``: a kernel where there is
    one; ``never``: references alone."""
    inner: str | Callable[..., Any] = "inductor"
    """What compiles the graph once the kernels are in it."""
    kernel_mode: Mode | None = None
    """The mode to choose kernels for; None: by whether a gradient can flow through the call."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's own options."""
    inductor_mode: str | None = None
    """``mode=`` of torch.compile, which is Inductor's."""
    verify: bool = False
    """Whether each kernel is compared with its reference while compiling, at the call's shapes:
    one that is not within `kernelgraph.graph.verify.tolerance.TOLERANCES` is not used."""
    gradients: Gradients = Gradients()  # noqa: RUF009 (a tuple)
    """``verify_gradients``, whether a kernel has to show that its gradients are the layer's before
    it trains anything, and ``wrong_gradient``, what is done about one whose gradients are not:
    ``recompute``, its forward is used and the backward runs the layer's own again; ``reference``,
    it is not used."""
    own_backward: bool = True
    """Whether backwards of kernels are used at all; False: each is the layer's, recomputed."""
    measure_seconds: float = MEASURE_SECONDS
    """How long ``fastest`` may measure in all, for one call of ``torch.compile``."""

    @classmethod
    def parse(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Check what ``torch.compile`` was given.

        Raises:
            ValueError: If an option is unknown or has a value that it cannot have.
            TypeError: If a value is of the wrong type.
        """
        given = dict(options or {})
        for name in given:
            if not isinstance(name, str):
                raise TypeError(f"the name of an option is a string, not {name!r}")
        policy = _policy(given)
        seconds = given.pop("measure_seconds", MEASURE_SECONDS)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"option measure_seconds is a number, not {seconds!r}")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"option measure_seconds is a number from 0 on, not {seconds!r}")
        inner = given.pop("inner", "inductor")
        if not (callable(inner) or inner in INNER):
            raise ValueError(
                f"option inner is one of {', '.join(INNER)} or a callable that takes a graph "
                f"module and example inputs, not {inner!r}"
            )
        kernel_mode = given.pop("kernel_mode", None)
        if kernel_mode is not None:
            try:
                kernel_mode = Mode.parse(kernel_mode)
            except TypeError:
                what = f"option kernel_mode is a kernelgraph.Mode, not {kernel_mode!r}"
                raise TypeError(what) from None
            tried(kernel_mode)
            kernel_mode |= Mode.TORCH_COMPILE
        gradients = Gradients.parse(
            given.pop("verify_gradients", True), given.pop("wrong_gradient", "recompute")
        )
        flags = {name: given.pop(name, default) for name, default in _FLAGS.items()}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise TypeError(f"option {name} is a bool, not {value!r}")
        _check_rest(given, mode, inner)
        rest = {"gradients": gradients, "measure_seconds": float(seconds), **flags}
        return cls(policy, inner, kernel_mode, given, mode, **rest)

    @property
    def graphs(self) -> bool:
        """Whether Inductor makes CUDA graphs."""
        if "triton.cudagraphs" in self.inductor:
            return bool(self.inductor["triton.cudagraphs"])
        return self.inductor_mode in ("reduce-overhead", "max-autotune")

    def cutting(self, ops: Sequence[str]) -> Options:
        """The same, with CUDA graphs cut around some ops."""
        if not ops:
            return self
        name = "custom_should_partition_ops"
        return replace(self, inductor={**self.inductor, name: [*self.inductor.get(name, ()), *ops]})

    def without_graphs(self) -> Options:
        """The same, but for CUDA graphs."""
        mode = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
        own = {k: v for k, v in self.inductor.items() if k != "triton.cudagraphs"}
        inductor_mode = mode.get(self.inductor_mode or "", self.inductor_mode)
        return replace(self, inductor=own, inductor_mode=inductor_mode)


def _policy(given: dict[str, Any]) -> str:
    if "policy" in given:
        where, policy = "option policy", given.pop("policy")
    else:
        where, policy = "KERNELGRAPH_POLICY", os.environ.get("KERNELGRAPH_POLICY") or "fastest"
    if policy not in POLICIES:
        raise ValueError(f"{where} is one of {', '.join(POLICIES)}, not {policy!r}")
    return str(policy)


def _check_rest(
    given: Mapping[str, Any], mode: str | None, inner: str | Callable[..., Any]
) -> None:
    ours = (
        "policy, measure_seconds, inner, kernel_mode, verify, verify_gradients, wrong_gradient "
        "and own_backward"
    )
    if inner != "inductor":
        # "default" is what torch.compile means by no mode.
        if given or mode not in (None, "default"):
            what = ", ".join([*sorted(given), *([f"mode={mode!r}"] if mode else [])])
            raise ValueError(
                f"{what}: not an option of hubkernels ({ours}), and Inductor's do not go with "
                f"inner={inner!r}"
            )
        return
    known = _torch.inductor_options()
    if unknown := sorted(k for k in given if k.replace("-", "_") not in known):
        raise ValueError(
            f"unknown option {', '.join(unknown)}: neither one of hubkernels ({ours}) nor one of "
            "Inductor's (torch._inductor.list_options())"
        )


def of_backend(backend: Callable[..., Any], kwargs: Mapping[str, Any]) -> Options | None:
    """The options that a graph is traced with, or None if ``backend`` is not ours."""
    if getattr(backend, "is_hubkernels", False):
        return Options.parse(kwargs.get("mode"), kwargs.get("options"))
    return None
