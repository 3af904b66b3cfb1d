"""The entry point: reads the arguments, runs the command, and turns errors into an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from kernelgraph.cli import hub_commands, local_commands
from kernelgraph.cli.console import ExitStatus
from kernelgraph.cli.parser import make_parser

_COMMANDS: dict[str, Callable[[argparse.Namespace], ExitStatus]] = {
    "versions": hub_commands.show_versions,
    "info": hub_commands.show_info,
    "download": hub_commands.download_kernels,
    "lock": hub_commands.lock_project,
    "verify": hub_commands.verify_kernels,
    "inspect": local_commands.inspect_program,
    "cache": local_commands.show_cache,
    "explain": local_commands.explain_choices,
    "demo": local_commands.run_demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments``, by default those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: If the arguments are wrong, or ask for help.
    """
    parsed = make_parser().parse_args(arguments)
    try:
        return _COMMANDS[parsed.command](parsed)
    except BrokenPipeError:  # the program that reads the output has closed it, as head does
        sys.stderr.close()
        return ExitStatus.DONE
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"kernelgraph: {error}", file=sys.stderr)
        is_no = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        return ExitStatus.NO if is_no else ExitStatus.UNREACHABLE
