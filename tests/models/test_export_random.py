"""Random models of random layers with random kernels, exported, against their eager calls."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch.export import Dim

from kernelgraph import Mode, export
from kernelgraph.programs.program_ops import ops_in
from tests.support.random_layers import Model, build, inputs_of, models
from tests.support.random_models import assert_kernels, assert_same, eager, examples, mapping


@contextlib.contextmanager
def guards_may_fail(may: bool) -> Iterator[None]:
    """A program checks the assumptions about sizes that torch made when it traced the model."""
    try:
        yield
    except AssertionError as error:
        if not may or "Guard failed" not in str(error):
            raise


@examples(10)
@given(models(training=False), st.booleans())
def test_exported_model_equals_eager_model(spec: Model, strict: bool) -> None:
    """A program returns and changes the same as the eager model with its kernels.

    It does so for other sizes than those of the export too, or raises for them.
    """
    note(spec.text())
    torch.manual_seed(0)
    model = build(spec)
    before = copy.deepcopy(model)
    dynamic = tuple(dict.fromkeys(range(t.dim()), Dim.AUTO) for t in inputs_of(spec, 6))
    with mapping(spec.layers), torch.no_grad():
        program = export(
            model,
            tuple(inputs_of(spec, 6)),
            mode=Mode.INFERENCE,
            dynamic_shapes=dynamic,
            strict=strict,
        )
        assert_kernels(spec)
    assert_same(dict(model.state_dict()), dict(before.state_dict()))
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert len(list(ops_in(program))) == len(spec.calls)
    twin, module = eager(spec, before), program.module()
    for length in (6, 9):
        inputs = inputs_of(spec, length)
        others = [copy.deepcopy(t) for t in inputs]
        with torch.no_grad():
            made = None
            with guards_may_fail(length != 6):
                made = module(*inputs)
            if made is None:
                continue
            assert_same(made, twin(*others))
        assert_same(inputs, others)
