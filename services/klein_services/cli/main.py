"""Where the `klein` command starts. Imports nothing of weight before an interruption can be told well."""

from __future__ import annotations

import sys

from klein_services.cli.exit_codes import INTERRUPTED


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        from klein_services.cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Cancelled.\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
