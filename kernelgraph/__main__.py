"""``python -m kernelgraph``."""

from kernelgraph.cli import main

main()
