"""All that a run of a program leaves behind, and how two runs differ."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.equivalence.programs import Program

Prepare = Callable[[nn.Module, list[Any]], tuple[Callable[..., Any], nn.Module, bool]]
"""Takes a model and the arguments of the first call; returns the callable, the module that has the
state, and whether that state is Python's too."""


@dataclasses.dataclass
class Outcome:
    """The values that a run leaves behind, by name, and the error that ended it."""

    values: dict[str, Any]
    error: str = ""


def run_program(program: Program, prepare: Prepare, model: nn.Module) -> Outcome:
    """Run all calls of a program on a new model.

    Args:
        program: The program.
        prepare: Compiles, exports or rewrites the model.
        model: A model that `Program.build` made.
    """
    values: dict[str, Any] = {}
    try:
        with _gradients(program):
            run, owner, has_python = prepare(model, program.inputs(0)[1])
            for call in range(len(program.sizes)):
                _call(program, call, run, values)
    except Exception as error:
        return Outcome(values, f"{type(error).__name__}: {_first_line(error)}")
    for name, parameter in owner.named_parameters():
        values[f"gradient of {name}"] = parameter.grad
    for name, tensor in owner.state_dict().items():
        values[f"state {name}"] = tensor.detach().clone()
    if has_python:
        for name, module in model.named_modules():
            values[f"attributes of {name}"] = _attributes(module)
    return Outcome(values)


def _gradients(program: Program) -> Any:
    if program.trains:
        return torch.enable_grad()
    return torch.no_grad() if program.mode == "no_grad" else torch.inference_mode()


def _call(program: Program, call: int, run: Callable[..., Any], values: dict[str, Any]) -> None:
    torch.manual_seed(call + 1)
    leaf, arguments = program.inputs(call)
    output = run(*arguments)
    values[f"call {call}, output"] = _copied(output)
    values[f"call {call}, arguments"] = _copied(arguments)
    roots = [v for v in _tensors(output) if v.requires_grad]
    if program.trains and roots:
        grads = [torch.arange(v.numel()).view(v.shape).cos().to(v.dtype) for v in roots]
        torch.autograd.backward(roots, grads)
        values[f"call {call}, gradient of the input"] = leaf.grad
    values[f"call {call}, next random number"] = torch.rand(2)


def _copied(value: Any) -> Any:
    """Return a copy of a value that later writes do not reach."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{k: _copied(v) for k, v in vars(value).items()}}
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_copied(part) for part in value)]
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _tensors(list(vars(value).values()))
    parts = value.values() if isinstance(value, dict) else value
    return (
        [t for part in parts for t in _tensors(part)]
        if isinstance(parts, (list, tuple)) or (isinstance(value, dict))
        else []
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, list)
    found = {k: v for k, v in vars(module).items() if k[0] != "_" and isinstance(v, plain)}
    found |= {"total": getattr(module, "total", None)}
    return copy.deepcopy(found)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200] if lines else ""


def difference(made: Outcome, expected: Outcome, loose: bool) -> str:
    """Return where a run differs first from what was expected; empty where nowhere.

    Args:
        made: The run.
        expected: The oracle.
        loose: Whether values were computed in bfloat16.
    """
    for name, value in made.values.items():
        if name not in expected.values:
            continue
        if found := _differs(value, expected.values[name], loose):
            return f"{name}: {found}"
    return ""


def _differs(made: Any, expected: Any, loose: bool) -> str:
    if isinstance(expected, Tensor) and isinstance(made, Tensor):
        return _tensors_differ(made, expected, loose)
    if isinstance(expected, dict) and isinstance(made, dict):
        if made.keys() != expected.keys():
            return f"keys {list(made)}, right are {list(expected)}"
        pairs = [(f"[{key}] ", made[key], expected[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(made, list):
        if len(made) != len(expected):
            return f"{len(made)} parts, right are {len(expected)}"
        pairs = [(f"[{i}] ", *both) for i, both in enumerate(zip(made, expected, strict=True))]
    else:
        same = type(made) is type(expected) and made == expected
        return "" if same else f"{_short(made)}, right is {_short(expected)}"
    return next((path + d for path, a, b in pairs if (d := _differs(a, b, loose))), "")


def _tensors_differ(made: Tensor, expected: Tensor, loose: bool) -> str:
    if made.shape != expected.shape or made.dtype != expected.dtype:
        mine, right = (tuple(made.shape), made.dtype), (tuple(expected.shape), expected.dtype)
        return f"{mine}, right is {right}"
    if not (made.is_floating_point() or made.is_complex()):
        return "" if torch.equal(made, expected) else f"{_short(made)}, right is {_short(expected)}"
    kind = torch.complex128 if made.is_complex() else torch.float64
    one, other = made.to(kind), expected.to(kind)
    if loose or made.dtype == torch.bfloat16:
        error = (one - other).norm() / other.norm().clamp_min(1e-3)
        close = error.item() < 0.15
    else:
        close = torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
    return "" if close else f"{_short(made)}, right is {_short(expected)}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        numbers = [f"{v:.4g}" for v in value.reshape(-1)[:6].tolist()]
        return f"{tuple(value.shape)} {' '.join(numbers)}"
    return repr(value)[:60]
