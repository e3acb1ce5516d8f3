"""The command line: `fused-ops`, or `python -m fused_ops`. Each module here adds a group of commands to the app."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(name="fused-ops", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Fused GPU kernels: inspect them, tune them, and export models that use them."""


for _group in ("kernels", "models", "doctor", "forecast"):
    importlib.import_module(f"{__name__}.{_group}").register(app)
