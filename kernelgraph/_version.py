"""The version of kernelgraph."""

__version__ = "0.1.0"
