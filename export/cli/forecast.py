"""The command `fused-ops forecast`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add this module's command to the app."""
    app.command()(forecast)


def forecast(
    op: Annotated[str, typer.Argument(help="The op's name, as softmax, layer_norm, rms_norm, linear, gated_linear, mlp.")],
    sizes: Annotated[list[int], typer.Argument(min=1, help="M N of rows, M N K of a product.")],
    gpu: Annotated[str, typer.Option(help="h100 or h200, or their full names.")] = "h100",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp8.")] = "bf16",
    pass_: Annotated[str, typer.Option("--pass", help="fwd, train_fwd, bwd or fwd+bwd.")] = "fwd",
    activation: Annotated[str, typer.Option(help="Of a product.")] = "none",
    wall: Annotated[bool, typer.Option(help="The time of an eager call, host time counted.")] = False,
    quick: Annotated[bool, typer.Option(help="Compile nothing: committed counts of the headline rows, else formulas.")] = False,
    jobs: Annotated[Optional[int], typer.Option(min=1, help="Processes to compile in; by default up to 4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON.")] = False,
) -> None:
    """Say how long one call should take on a GPU, and what limits it. No GPU is needed, and nothing is measured.

    What the call launches is compiled for sm_90, its machine code counted, and the counts weighed with the GPU's coefficients.
    """
    from ..._tools.forecast_call import ArgumentError, forecast_call, gpu_of, row_of

    try:
        known = gpu_of(gpu)
        row = row_of(op, sizes, dtype, pass_, activation, wall)
        found = forecast_call(row, activation, known, quick, jobs)
    except ArgumentError as error:
        raise typer.BadParameter(str(error), param_hint=error.argument) from None
    except RuntimeError as error:
        typer.echo(f"fused-ops forecast: {error}", err=True)
        raise typer.Exit(2) from None
    launches = [_launch(found, n) for n in range(len(found.forecast.launches))]
    if as_json:
        answer = {
            "gpu": known.name, "seconds": found.forecast.seconds, "binding": found.forecast.binding,
            "percent_of_limit": round(found.percent_of_limit, 1), "counts": found.source, "launches": launches,
        }  # fmt: skip
        typer.echo(json.dumps(answer, indent=1))
        return
    typer.echo(
        f"{found.forecast.seconds * 1e6:.1f} us on {known.name}, limited by {found.forecast.binding}, "
        f"{found.percent_of_limit:.0f}% of the limit: a forecast, not a measurement ({found.source})"
    )
    _print(launches)


def _launch(found: Any, number: int) -> dict[str, Any]:
    """One launch: its time, and the audit's columns where it was counted."""
    from ..._tools.forecast.launched import columns

    part = found.forecast.launches[number]
    said = {"name": part.name, "seconds": part.seconds, "binding": part.binding, "limits": dict(part.limits)}
    if found.launches and not (one := found.launches[number]).is_aten:
        counts = columns(one, found.gpu)._asdict()
        said |= {key: counts[key] for key in list(counts)[:5]} | {"registers": one.registers, "spill_bytes": one.spill_bytes}
    return said


def _print(launches: list[dict[str, Any]]) -> None:
    heads = ("launch", "us", "bound by", "regs", "spill", "an SM", "ins/element", "bytes on the way/SM", "barriers/row")
    table = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False)
    names = (
        "registers",
        "spill_bytes",
        "programs_per_sm",
        "instructions_per_element",
        "bytes_in_flight_per_sm",
        "barriers_per_row",
    )
    for part in launches:
        figures = (str(part.get(name, "")) for name in names)
        table.add_row(part["name"], f"{part['seconds'] * 1e6:.1f}", part["binding"], *figures)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)
