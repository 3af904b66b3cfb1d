"""A generator of random programs: right kernels change nothing of what a program does.

`cores` has what a layer computes, each by several means; `layers` draws a layer and its kernel as
source text; `programs` draws a model with plain code around its layers; `outcomes` runs a program
and compares what it leaves behind; `paths` are the ways to run it with kernels; `verdicts` judges
one program on one path, `workers` many in child processes. ``python -m tests.equivalence --help``
tells how to run many.
"""
