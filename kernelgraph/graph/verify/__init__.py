"""Whether a kernel computes what the layer does.

There are two checks, of which only the first runs without being asked for:

- A trial, before a kernel trains: `judge` runs the kernel and the reference on made-up operands
  (``trial_runs``), compares their results and gradients (``comparison``, ``deviation``), finds out
  how the kernel's own backward has to be run (``own_backward``) and returns a `Verdict`
  (``verdict``). ``trial`` is the pipeline.
- ``options={"verify": True}``, while a call is compiled: `output_error` compares the results of one
  call (``outputs``).

``tolerance`` holds the bounds of both, and says why there are two.

Invariants:
    - Both run apart from the trace around them: no gradient is recorded there, random numbers go on
      as if nothing had run, and the layer's weights and operands keep their values.
    - A kernel whose output is found wrong never trains; one whose gradient is found wrong never
      trains with its own backward.
    - A kernel that computes the same by other means is not refused for its rounding.
    - Being out of memory is no verdict on disk, and neither is an error that was raised.
"""

from kernelgraph.graph.verify.outputs import output_error
from kernelgraph.graph.verify.trial import judge
from kernelgraph.graph.verify.verdict import Verdict

__all__ = ["Verdict", "judge", "output_error"]
