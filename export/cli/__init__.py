"""The command line: `fused-ops`, or `python -m fused_ops`. One module a group of commands; each adds them to the app."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(name="fused-ops", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Fused GPU kernels: look at them, tune them, and take models that use them to a file that serves."""


for _group in ("kernels", "models", "doctor"):
    importlib.import_module(f"{__name__}.{_group}").register(app)
