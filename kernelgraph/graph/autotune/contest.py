"""The contest for one tuning key: its candidates are compiled, timed, and the fastest wins."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from kernelgraph.graph import _torch
from kernelgraph.graph.autotune import candidates
from kernelgraph.graph.autotune.candidates import Unmeasurable, UntunedCall
from kernelgraph.graph.autotune.fusion_rule import winner_by_rule
from kernelgraph.graph.autotune.records import Candidate, Implementation, Session, Winner
from kernelgraph.graph.autotune.region import Region, cut_region
from kernelgraph.graph.infer import does_the_same, sample_inputs
from kernelgraph.graph.lowering import Compiler
from kernelgraph.graph.timing import GraphPool, Sampler, Timing, fastest, measure, sampler_of
from kernelgraph.keys import source_of
from kernelgraph.report import error_text

logger = logging.getLogger("kernelgraph")

REFERENCE = Implementation.REFERENCE.value
"""The label of the layer itself among the candidates."""


class Contest:
    """Measures the candidates for a call where it stands in a graph.

    Args:
        graph_module: The graph.
        node: The node of the call's op in it.
        untuned: The call.
        session: Has the time that is left for measuring.
        compiler: What will compile the graph.
        cuda_graphs: Whether the graph will be run as a CUDA graph.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        node: fx.Node,
        untuned: UntunedCall,
        session: Session,
        compiler: Compiler,
        *,
        cuda_graphs: bool,
    ) -> None:
        self.layer_name = untuned.site.layer.layer_name
        self._graph_module = graph_module
        self._node = node
        self._untuned = untuned
        self._session = session
        self._compiler = compiler
        self._cuda_graphs = cuda_graphs
        self._pool: GraphPool | None = None
        """The memory of the candidates' CUDA graphs, which use it one after the other."""

    def winner(self) -> Winner:
        """Return the winner; by rule where nothing can be measured."""
        session, layer = self._session, self._untuned.site.layer
        if session.seconds_left <= 0:
            why = f"the {session.seconds:g} s for measuring were over"
            return winner_by_rule(self._untuned, why)
        try:
            with session.measuring(), self._untuned.call.program_data_kept(layer):
                return self._measured_winner()
        except Unmeasurable as error:
            why = str(error)
        except torch.OutOfMemoryError:
            why = "out of memory"
        except Exception as error:  # a compiler or a kernel may fail on inputs that are made up
            logger.debug("%s cannot be measured", self.layer_name, exc_info=True)
            why = error_text(error)
        return winner_by_rule(self._untuned, why)

    def _measured_winner(self) -> Winner:
        region = cut_region(self._graph_module, self._node)
        reference = Candidate(Implementation.REFERENCE)
        labelled = {REFERENCE: reference, **dict(self._kernel_candidates())}
        with sample_inputs.apart(region.inputs, 0):
            samplers, errors = self._samplers(region, labelled)
            if not samplers.keys() - {REFERENCE}:
                error = next(errors[label] for label in labelled if label != REFERENCE)
                raise Unmeasurable(f"no kernel could be run on inputs that are made up: {error}")
            if REFERENCE not in samplers and len(samplers) == 1:
                why = f"the layer itself cannot be traced: {errors[REFERENCE]}"
                return Winner(*labelled[next(iter(samplers))], why, measured=True)
            times = measure(list(samplers.values()), lambda: self._session.seconds_left <= 0)
        timings = dict(zip(samplers, times, strict=True))
        chosen = fastest(timings, REFERENCE)
        return Winner(*labelled[chosen], _in_words(timings, chosen), measured=True)

    def _kernel_candidates(self) -> Iterator[tuple[str, Candidate]]:
        """Yield the candidates with a kernel and their labels, those that are preferred first."""
        kernels = self._untuned.kernels
        labels = ["kernel"] if len(kernels) == 1 else [str(kernel) for kernel in kernels]
        for i, label in enumerate(labels):
            yield label, Candidate(Implementation.OP, i)
        for i, label in enumerate(labels):
            if getattr(kernels[i].layer, "can_torch_compile", False) and self._may_be_traced(i):
                yield f"{label} traced", Candidate(Implementation.NATIVE, i)

    def _may_be_traced(self, number: int) -> bool:
        """Whether a kernel does what the layer does, as far as runs on fakes show, and needs no
        verification or has passed it as an op already.

        A kernel that is traced is not verified again. Where a gradient can flow it has to be that
        of the kernel's own backward, which is verified with the op, and again once the code of
        the kernel or the layer has changed.
        """
        untuned, kernel = self._untuned, self._untuned.kernels[number]
        if not does_the_same(kernel, untuned.site.layer, untuned.call, untuned.operands):
            return False
        if untuned.options.verify or not untuned.site.grad:
            return not untuned.options.verify
        own = untuned.gradient is not None and untuned.gradient.own is not None
        return number == 0 and own and source_of(untuned.site.layer, kernel) != ""

    def _samplers(
        self, region: Region, labelled: Mapping[str, Candidate]
    ) -> tuple[dict[str, Sampler], dict[str, str]]:
        """Return the samplers of the candidates that run, and the errors of the others, by
        label."""
        inputs = candidates.inputs_for(region, self._untuned)
        if self._cuda_graphs and any(v.is_cuda for v in inputs if isinstance(v, torch.Tensor)):
            self._pool = torch.cuda.graph_pool_handle()
        samplers: dict[str, Sampler] = {}
        errors: dict[str, str] = {}
        for label, candidate in labelled.items():
            if samplers.keys() - {REFERENCE} and self._session.seconds_left <= 0:
                break
            try:
                samplers[label] = self._sampler(region, inputs, candidate)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                errors[label] = error_text(error)
                level = logging.DEBUG if label == REFERENCE else logging.WARNING
                logger.log(
                    level, "%s: %s cannot be timed: %s", self.layer_name, label, errors[label]
                )
                logger.debug("%s: %s cannot be timed", self.layer_name, label, exc_info=True)
                # Behind a graph break the layer would run uncompiled.
                if label == REFERENCE and not _torch.full_graph():
                    samplers[label] = self._sampler(region, inputs, candidate, compiled=False)
        return samplers, errors

    def _sampler(
        self,
        region: Region,
        inputs: list[object],
        candidate: Candidate,
        *,
        compiled: bool = True,
    ) -> Sampler:
        program = candidates.program(region, self._untuned, candidate)
        candidates.check_real(program, inputs)
        grad = self._untuned.site.grad
        # In no CUDA graph: a kernel's run that is kept for its backward, and what breaks graphs.
        keeps_run = grad and candidate.implementation is Implementation.OP
        pool = self._pool if compiled and not keeps_run else None
        with torch.set_grad_enabled(grad):
            if not compiled:
                return sampler_of(program, inputs, grad, pool)
            with _torch.compiling_apart():
                run = self._compiler(program, inputs)
            return sampler_of(run, inputs, grad, pool)


def _in_words(timings: Mapping[str, Timing], chosen: str) -> str:
    """Return the times, that of the winner first."""
    labels = [chosen, *(label for label in timings if label != chosen)]
    return ", ".join(f"{label} {timings[label]}" for label in labels)
