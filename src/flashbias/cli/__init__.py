"""The command line: `flashbias`, one file per subcommand."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]

REQUIRED = ("typer", "rich")


def main() -> None:
    """Run the command line and leave with its exit code.

    Raises:
        SystemExit: always. 0 done, 2 an argument cannot be used, 1 another failure, 130 interrupted.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"flashbias: the command line needs {' and '.join(missing)}: pip install 'flashbias[cli]'")
    from flashbias.cli.app import run

    sys.exit(run(sys.argv[1:]))
