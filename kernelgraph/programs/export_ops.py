"""Makes the ops of a program while its model is exported.

An op is made from the same data that a saved program has of it, so that what runs where the model
is exported is what will run elsewhere. The sizes of its results are recorded by one run of the
layer or its kernel on fakes whose sizes are symbols.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from kernelgraph.graph import _torch, ops
from kernelgraph.graph.calls import Call, Runner, State
from kernelgraph.graph.gradients import Gradient, wanted_of
from kernelgraph.graph.infer import (
    Effects,
    InferOutput,
    OutputSpec,
    UnknownShape,
    differentiable,
    infer_output,
    run_on_fakes,
    static_key,
)
from kernelgraph.graph.lowering import Options, Site
from kernelgraph.graph.ops import Lowered
from kernelgraph.kernel import Kernel
from kernelgraph.layers import Extensible
from kernelgraph.programs.portable_call import call_from_json, check_needs_no_code
from kernelgraph.programs.portable_json import NotPortable, as_object
from kernelgraph.programs.portable_sizes import (
    NewSize,
    Number,
    OperandSize,
    Operation,
    ResultSizes,
    SizeExpression,
    Sizes,
)
from kernelgraph.programs.program_ops import (
    GradientFlow,
    KernelMember,
    ProgramOp,
    ProgramOpSpec,
    install,
    installed_ops,
)
from kernelgraph.programs.references import ExportedCall

EXPORT_ROOT = "_export_root."
"""The prefix that Dynamo has before the paths of layers in ``torch.export``."""


class ExportedOps:
    """The ops of one model that is being exported, and the calls that they are made for."""

    def __init__(self) -> None:
        self.calls: dict[str, list[ExportedCall]] = {}
        """For each op, by name, the calls that it was made for."""
        self._made: dict[tuple[object, ...], _MadeOp] = {}

    def op_for(
        self, site: Site, kernel: Kernel, call: Call, operands: Sequence[object], options: Options
    ) -> tuple[Lowered, Gradient | None]:
        """Return the op for a call, and where its gradient comes from if one can flow through it.

        This takes the place of `kernelgraph.graph.lowering.op_for`. The kernel is not verified, and
        the gradient is always that of the reference.

        Raises:
            UnsupportedValue: As `ops.lower` raises, and if the call depends on the model's code.
            AttributeError, RuntimeError: As `ops.lower` raises.
        """
        layer, training = site.layer, site.grad
        symbolic, _, _ = _torch.symbolic_like(operands, everything=False)
        operands_key = _operands_key(symbolic)
        key = (kernel.layer, kernel.origin, layer, call.describe(), operands_key, training)
        if key not in self._made:
            with _torch.out_of_export():
                self._made[key] = _make_op(kernel, layer, call, symbolic, site.module, training)
        name, aliases = self._made[key]
        self.calls.setdefault(name, []).append(ExportedCall(layer, call, symbolic))
        installed = installed_ops()[name]
        installed.body.places.add(site.module, site.path.removeprefix(EXPORT_ROOT))
        lowered, gradient = _lowered(name, installed.spec, operands, installed.body.returns)
        return replace(lowered, aliases=aliases), gradient


class _MadeOp(NamedTuple):
    """The name of an op, and the `Lowered.aliases` of its calls."""

    name: str
    aliases: tuple[tuple[int, int], ...]


def _operands_key(operands: Sequence[object]) -> tuple[object, ...]:
    """Return everything about operands that an op for a call with them may depend on."""
    key: list[object] = []
    for value in operands:
        if isinstance(value, Tensor):
            numbers = [(type(n), _torch.hint(n)) for n in (*value.shape, *value.stride())]
            key += [*numbers, value.dtype, value.device, value.requires_grad]
        else:
            key.append((type(value), _torch.hint(value)))
    return tuple(key)


def _lowered(
    name: str, spec: ProgramOpSpec, operands: Sequence[object], returns: int
) -> tuple[Lowered, Gradient | None]:
    results = spec.sizes(operands) if static_key(operands) else spec.output_spec.results
    packed = ops.packed_operands(spec.call)
    lowered = Lowered(name, spec.output, results, spec.writes.layer, packed, returns)
    gradient = Gradient(spec.flow.operands, None, "exported") if spec.flow else None
    return lowered, gradient


# --- making an op -------------------------------------------------------------------------------


def _make_op(
    kernel: Kernel,
    layer: Extensible,
    call: Call,
    operands: Sequence[object],
    module: nn.Module,
    training: bool,
) -> _MadeOp:
    """Register the op for a call, made from data that was through JSON."""
    check_needs_no_code(module, kernel.forward)
    source, output_spec = infer_output(kernel, layer, call, operands)
    sizes = _sizes(source, output_spec, operands)
    writes = Effects.of(output_spec)
    spec = ProgramOpSpec(
        layer.layer_name,
        _member_of(kernel),
        call,
        output_spec.output,
        sizes,
        writes,
        _flow(layer, call, operands, output_spec, writes) if training else None,
    )
    needed = [path for path, _ in State.of(module, [kernel.forward]).constants]
    data = as_object(json.loads(json.dumps(spec.to_json(needed))))
    if output_spec.source == "kernel":
        try:
            run_on_fakes(Runner(kernel.forward, call_from_json(data["call"])), operands)
        except AttributeError as error:
            raise NotPortable(f"the kernel needs the layer's class: {error}") from error
    name = install(ProgramOp.of(data, kernel.origin), kernel).op.name
    return _MadeOp(name, output_spec.aliases)


def _flow(
    layer: Extensible,
    call: Call,
    operands: Sequence[object],
    output_spec: OutputSpec,
    writes: Effects,
) -> GradientFlow:
    wanted = wanted_of(operands, every=True)
    results = differentiable(layer, call, operands, wanted, writes.layer)
    count = len(output_spec.results) + len(writes.layer)
    return GradientFlow(wanted, results or (True,) * count)


def _member_of(kernel: Kernel) -> KernelMember:
    repository = kernel.selection.repository
    if isinstance(name := getattr(repository, "layer_name", None), str):
        return KernelMember("layer_name", name)
    if isinstance(name := getattr(repository, "func_name", None), str):
        return KernelMember("func_name", name)
    return KernelMember("layer_name", kernel.layer.__name__)


def _sizes(source: InferOutput, output_spec: OutputSpec, operands: Sequence[object]) -> Sizes:
    # A kernel that has to run for real is not run at sizes that it may not support.
    if not output_spec.source.startswith("probe"):
        try:
            return record_sizes(source, operands, everything=True)[0]
        except Exception:  # it branches on sizes, for example, in a way that is no expression
            pass
    sizes, again = record_sizes(source, operands, everything=False)
    if again.output != output_spec.output:
        raise UnknownShape("the structure of what it returns depends on sizes")
    return sizes


# --- recording sizes ----------------------------------------------------------------------------

_SYMPY_FUNCTIONS = {
    "Add": "+",
    "Mul": "*",
    "FloorDiv": "//",
    "CleanDiv": "//",
    "Mod": "%",
    "PythonMod": "%",
    "Pow": "**",
    "PowByNatural": "**",
    "Max": "max",
    "Min": "min",
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
    "And": "and",
    "Or": "or",
    "Not": "not",
}
"""The functions of `FUNCTIONS`, by the names that sympy and torch have for them."""


class _NotExpressible(Exception):
    """A size is no expression over `FUNCTIONS`."""


def record_sizes(
    source: InferOutput, operands: Sequence[object], *, everything: bool
) -> tuple[Sizes, OutputSpec]:
    """Find the sizes of the results of calls like one with ``operands``.

    Args:
        source: Infers the output of a call.
        operands: The operands of one call.
        everything: Whether every size of every operand may vary; else only those that are symbolic
            in this call may.

    Returns:
        The sizes, and the output spec of a call with symbols for the sizes that may vary.

    Raises:
        UnknownShape: If they are no expressions over `FUNCTIONS`.
        Exception: Whatever ``source`` raises.
    """
    symbolic, places, env = _torch.symbolic_like(operands, everything)
    spec = source(symbolic)
    new: dict[object, int] = {}
    try:
        results = tuple(
            ResultSizes(
                tuple(_from_sympy(_torch.expression(size), places, new) for size in result.shape),
                result.dtype,
                result.device.type,
                result.order,
            )
            for result in spec.results
        )
        guards = [part for guard in _torch.guards_of(env) for part in _conjuncts(guard)]
        conditions = [_from_sympy(guard, places, {}) for guard in guards if _affects_sizes(guard)]
    except _NotExpressible as error:
        raise UnknownShape(f"the size of a result: {error}") from None
    conditions += _fixed(operands, everything)
    return Sizes(results, tuple(dict.fromkeys(conditions))), spec


def _from_sympy(
    expression: Any, places: Mapping[object, tuple[int, int]], new: dict[object, int]
) -> SizeExpression:
    """Return a size or a condition in terms of operands.

    Args:
        expression: An int, or an expression of sympy.
        places: The operand and the dimension of each symbol that is a size of an operand.
        new: The numbers of the other symbols, which depend on values; a new one is added.

    Raises:
        _NotExpressible: If a function in it is not one of `FUNCTIONS`.
    """
    if not isinstance(expression, (_torch.Expression, _torch.Relation)) or expression.is_Integer:
        return Number(int(expression))
    if expression.is_Symbol:
        if expression in places:
            return OperandSize(*places[expression])
        return NewSize(new.setdefault(expression, len(new)))
    name = type(expression).__name__
    if name not in _SYMPY_FUNCTIONS:
        raise _NotExpressible(f"{expression} cannot be written as data")
    parts = (_from_sympy(part, places, new) for part in expression.args)
    return Operation(_SYMPY_FUNCTIONS[name], tuple(parts))


def _conjuncts(guard: Any) -> Sequence[Any]:
    return guard.args if type(guard).__name__ == "And" else (guard,)


def _affects_sizes(guard: Any) -> bool:
    """Whether a guard can change the sizes of the results.

    Fakes add many guards that cannot: that a size is not 0 or 1, and how strides, which are
    products of sizes, compare. A condition that is left out by mistake shows when the op runs, by
    a result of another size than expected.
    """
    if type(guard).__name__ == "Equality":
        return True
    if not isinstance(guard, _torch.Relation) or any(part.is_Mul for part in guard.args):
        return False
    return not all(part.is_Symbol or part in (0, 1, 2) for part in guard.args) or not any(
        part.is_Integer for part in guard.args
    )


def _fixed(operands: Sequence[object], everything: bool) -> list[SizeExpression]:
    """Return conditions that each size and number without a symbol has the value of this call."""
    found = []
    for i, value in enumerate(operands):
        if isinstance(value, Tensor) and not everything:
            found += [(i, d, n) for d, n in enumerate(value.shape) if type(n) is int]
        elif type(value) is int:
            found.append((i, 0, value))
    return [Operation("==", (OperandSize(i, d), Number(n))) for i, d, n in found]
