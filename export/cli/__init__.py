"""The command line: `fused-ops`, or `python -m fused_ops`. Each module here adds a group of commands to the app."""

from __future__ import annotations

import importlib

import typer

from ..._runtime import settings

app = typer.Typer(name="fused-ops", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root(context: typer.Context) -> None:
    """Fused GPU kernels: inspect them, tune them, and export models that use them."""
    if settings.REFUSED and context.invoked_subcommand != "doctor":  # which shows them
        for refusal in settings.REFUSED:
            typer.echo(f"fused-ops {context.invoked_subcommand}: {refusal}", err=True)
        raise typer.Exit(2)


for _group in ("kernels", "models", "doctor", "forecast"):
    importlib.import_module(f"{__name__}.{_group}").register(app)
