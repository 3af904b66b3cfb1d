"""The ``kernelgraph`` command: look at kernels, lock them, and see what this machine has found out.

`entry` runs a command and `parser` reads its arguments. `hub_commands` has the commands about
kernels (``versions``, ``info``, ``download``, ``lock``, ``verify``), which print what
`kernel_checks` finds; `local_commands` has those about this machine (``inspect``, ``explain``,
``cache``, ``demo``). All of them print by `console`.

Invariants:

- No command but ``demo`` imports or runs a kernel's code.
- Starting the command (``kernelgraph --help``) imports neither torch nor huggingface_hub.
- An error that a user can cause is one line on the standard error and an exit status: `main` raises
  nothing but argparse's SystemExit.
- With ``--json`` the standard output has one JSON value or, after an error, nothing.
"""

from kernelgraph.cli.entry import main

__all__ = [
    "main",
]
