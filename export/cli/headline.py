"""`fused-ops audit --headline`: what each launch of the headline benchmark rows costs, and whether that is more than before."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HEADS = ("row", "kernel", "regs", "spill", "an SM", "ins/element", "bytes on the way/SM", "barriers/row", "L2 footprint", "us", "% of limit", "bound by")  # fmt: skip


def audit_headline(kernel: str, as_json: bool, jobs: int | None, python: str | None, write_table: bool, gpu: str) -> None:
    """Count the launches, print them, and exit with 1 where one costs more than the committed table says."""
    from ..._tools import headline_table
    from ..._tools.forecast import GPUS, gpu_named
    from ..._tools.headline import headline_rows
    from ..._tools.launches import Launch

    coefficients = gpu_named(gpu)
    if coefficients is None:
        raise typer.BadParameter(f"got {gpu!r}, allowed: {', '.join(GPUS)}", param_hint="--gpu")
    if write_table and kernel:
        raise typer.BadParameter("the table is written whole, without --kernel", param_hint="--write-table")
    try:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("listing", total=None)
            launches = headline_table.listed_rows(headline_rows())
            if kernel:
                launches = {key: part for key, part in launches.items() if any(kernel in one.kernel for one in part if isinstance(one, Launch))}  # fmt: skip
            if not launches:
                raise typer.BadParameter(
                    f"no headline row launches a kernel whose name contains {kernel!r}", param_hint="--kernel"
                )
            total = sum(isinstance(one, Launch) for part in launches.values() for one in part)
            progress.update(task, description="compiling", total=total)
            counted, triton = headline_table.count_launches(
                launches, jobs=jobs, python=python, done=lambda: progress.advance(task)
            )
        path = headline_table.table_of(triton)
        if write_table:
            headline_table.save(counted, path)
        wrong = headline_table.findings(counted, headline_table.load(path))
    except (OSError, RuntimeError, ValueError) as error:
        typer.echo(f"fused-ops audit: {error}", err=True)
        raise typer.Exit(2) from None
    rows = [
        as_row(" ".join(key), one, coefficients, triton) for key, part in counted.items() for one in part if not one.is_aten
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _print(rows)
    for key, name, finding in wrong:
        typer.echo(f"{' '.join(key)}: {name}: {finding}", err=True)
    said = f"{len(wrong)} findings" if wrong else "no findings"
    typer.echo(
        f"{len(rows)} launches of {len(counted)} rows, compiled by Triton {triton}, against {path.name}: {said}", err=True
    )
    raise typer.Exit(1 if wrong else 0)


def as_row(name: str, one: Any, gpu: Any, triton: str) -> dict[str, Any]:
    """A counted launch as a row of the audit's JSON."""
    from ..._tools.forecast.launched import columns

    return {
        "kernel": one.kernel, "config": one.config, "arch": 90, "dtype": name.split()[2], "registers": one.registers,
        "spill_bytes": one.spill_bytes, "shared_bytes": one.shared_bytes, "load_bits": None, "store_bits": None, "mma": None,
        "triton": triton, "row": name, **columns(one, gpu)._asdict(),
    }  # fmt: skip


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(*HEADS, box=box.SIMPLE_HEAD, pad_edge=False, caption="us, % of limit: a forecast, not a measurement")
    for column in table.columns:
        column.no_wrap = True
    names = ("row", "kernel", "registers", "spill_bytes", "programs_per_sm", "instructions_per_element", "bytes_in_flight_per_sm",
             "barriers_per_row", "l2_footprint_bytes", "forecast_us", "percent_of_limit", "bound_by")  # fmt: skip
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=240).print(table)
