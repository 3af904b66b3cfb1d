"""Timing compiled programs, and finding the ops that no CUDA graph can hold.

`benchmark` times programs in turns and has the rule that tells whether one is faster. Its samplers
(`samplers`) run a program on the host, on a CUDA device, or as a CUDA graph. `cuda_graphs` runs ops
outside of any graph to find those that synchronize with the device.

Invariants:

- Programs that are compared take turns, so that a machine that is slower for a while slows all.
- A time comes with the bounds of its error; `fastest` never prefers a program that was measured
  slower than another by more than these.
- An op that synchronizes through torch is found before a CUDA graph is captured, not during it.
- Nothing here decides between kernels, or writes to disk.
"""

from kernelgraph.graph.timing.benchmark import MARGIN, Sampler, Timing, fastest, measure
from kernelgraph.graph.timing.cuda_graphs import InferenceCall, ops_that_synchronize
from kernelgraph.graph.timing.samplers import GraphPool, sampler_of

__all__ = [
    "MARGIN",
    "GraphPool",
    "InferenceCall",
    "Sampler",
    "Timing",
    "fastest",
    "measure",
    "ops_that_synchronize",
    "sampler_of",
]
