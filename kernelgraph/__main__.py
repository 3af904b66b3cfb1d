"""Runs the command as ``python -m kernelgraph``."""

import sys

from kernelgraph.cli import main

sys.exit(main())
