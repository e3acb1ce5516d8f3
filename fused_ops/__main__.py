"""The door to the command line, which lives in export/cli."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `fused-ops`; say what to install when the command line's packages are missing."""
    try:
        from .export.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"fused-ops: {error.name} is not installed; the command line needs: pip install 'fused-ops[cli]'")
    app()


if __name__ == "__main__":
    main()
