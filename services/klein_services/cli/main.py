"""Entry point of the `klein` command. Imports lazily, so that Ctrl-C during the start exits with one line."""

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
