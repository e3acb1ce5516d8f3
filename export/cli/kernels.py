"""The commands `fused-ops audit` and `fused-ops tune`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

COMPILING_PART = 0.35  # of the time that tuning is given: what compiling beforehand may take at the most


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(audit)
    app.command()(tune)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def audit(
    arch: Annotated[str, typer.Option(help="Compute capabilities to compile for, as 90 or 80,90,100,120.")] = "80,90,100,120",
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of rows as JSON.")] = False,
    jobs: Annotated[Optional[int], typer.Option(min=1, help="Processes to compile in; by default up to 4.")] = None,
    python: Annotated[
        Optional[str], typer.Option(help="Interpreter whose Triton compiles; it needs no torch. By default this one.")
    ] = None,
    write_table: Annotated[
        bool, typer.Option("--write-table", help="First write what is found to the table that it is held to.")
    ] = False,
    headline: Annotated[
        bool,
        typer.Option(
            help="The launches of the headline benchmark rows instead, for sm_90: counted, forecast, held to a table."
        ),
    ] = False,
    gpu: Annotated[str, typer.Option(help="With --headline: whose coefficients forecast, h100 or h200.")] = "h100",
) -> None:
    """Compile every kernel ahead of time, with no GPU, and show what it costs: registers, spills, memory access.

    Exits with 1 if a kernel spills, needs more shared memory than there is, loads aligned rows in less than 128 bits,
    does not compile, or if an SM holds fewer programs of it than fused_ops/_tools/occupancy.csv says for this Triton. Kernels that need a later Triton than the one that compiles (clusters) are skipped.
    With --headline: if a launch costs more than fused_ops/_tools/headline-<Triton>.csv says.
    """
    from ..._tools import audit as audit_module

    if headline:
        from .headline import audit_headline

        return audit_headline(kernel, as_json, jobs, python, write_table, gpu)

    try:
        architectures = audit_module.parse_architectures(arch)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--arch") from None
    try:
        cases = audit_module.audit_cases(architectures, lambda case: kernel in case["kernel"])
    except RuntimeError as error:
        typer.echo(f"fused-ops audit: {error}", err=True)
        raise typer.Exit(2) from None
    if not cases:
        raise typer.BadParameter(f"no kernel's name contains {kernel!r}", param_hint="--kernel")
    with _progress() as progress:
        task = progress.add_task("compiling", total=len(cases))
        try:
            rows = audit_module.run_audit(cases, jobs, python, lambda: progress.advance(task))
        except (OSError, RuntimeError) as error:
            progress.stop()
            typer.echo(f"fused-ops audit: {error}", err=True)
            raise typer.Exit(2) from None
    if write_table:
        try:
            audit_module.write_table(rows)
        except (OSError, ValueError) as error:
            typer.echo(f"fused-ops audit: --write-table: {error}", err=True)
            raise typer.Exit(2) from None
    version, skipped = rows[0].triton, [row.skipped for row in rows if row.skipped]
    rows = [row for row in rows if not row.skipped]
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        _print_audit(rows)
    wrong = [(row, finding) for row in rows for finding in row.findings()]
    for row, finding in wrong:
        typer.echo(f"{row.kernel} {row.config} {row.dtype} sm_{row.arch}: {finding}", err=True)
    summary = f"{len(rows)} kernels compiled for {len(architectures)} architectures by Triton {version}"
    if skipped:
        summary += f", {len(skipped)} skipped ({', '.join(sorted(set(skipped)))})"
    typer.echo(f"{summary}: {len(wrong)} findings" if wrong else f"{summary}: no findings", err=True)
    raise typer.Exit(1 if wrong else 0)


def tune(
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this, as softmax_fwd.")] = "",
    dtype: Annotated[
        Optional[list[str]], typer.Option(help="Element types, as bf16 or bf16,fp32. By default bf16 and fp32.")
    ] = None,
    keys: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Only these: 'headline', or a regular expression found in a name such as softmax_fwd-4096x1024-bf16."
        ),
    ] = None,
    seconds: Annotated[Optional[float], typer.Option(help="Stop after so many seconds; what was measured is kept.")] = None,
    again: Annotated[bool, typer.Option(help="Measure what was measured before, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table of configurations as JSON.")] = False,
) -> None:
    """Measure the row kernels' configurations on this machine's GPU and keep the fastest for this user.

    The most valuable shapes come first. The candidates are compiled beforehand, on all cores. A run that was stopped continues
    where it was. Exits with 2 if there is no GPU, and with 1 if the GPU failed on the way.
    """
    import torch

    from ..._runtime.settings import user_folder
    from ..._runtime.tables import own_folder
    from ..._tools import tune_measure

    if seconds is not None and not seconds > 0:
        raise typer.BadParameter(f"got {seconds}, allowed: more than 0", param_hint="--seconds")
    try:
        dtypes = tune_measure.parse_dtypes(dtype or ["bf16,fp32"])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from None
    chosen = [key for key in tune_measure.all_keys(dtypes) if kernel in key.kernel]
    if not chosen:
        raise typer.BadParameter(f"no tuned kernel's name contains {kernel!r}", param_hint="--kernel")
    try:
        chosen = tune_measure.select(chosen, dtypes, keys or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--keys") from None
    if not torch.cuda.is_available():
        typer.echo("fused-ops tune: it measures on a GPU, and torch sees none here", err=True)
        raise typer.Exit(2)
    try:
        own_folder()  # before anything is measured
    except (OSError, ValueError) as error:
        typer.echo(f"fused-ops tune: {user_folder()}: {error}; FUSED_OPS_CACHE names another folder", err=True)
        raise typer.Exit(2) from None
    _tune(chosen, dtypes, seconds, again, as_json)


def _tune(keys: list[Any], dtypes: dict[int, Any], seconds: float | None, again: bool, as_json: bool) -> None:
    """Compile the candidates of keys, measure them, and say what came of it."""
    import torch

    from ..._runtime import settings, tables
    from ..._tools import precompile, tune_measure
    from ..._tools import tune as tune_module
    from ..._tools.launches import Gpu

    start = time.monotonic()
    limit = float("inf") if seconds is None else seconds
    owner = tables.machine(torch.cuda.current_device())
    todo = keys if again else [key for key in keys if key not in tables.saved(owner)]
    calls = tune_measure.candidate_calls(todo, dtypes, owner.clusters)
    if calls:
        compiled = precompile.precompile(calls, Gpu.current(), seconds=COMPILING_PART * limit, longest_first=False)
        typer.echo(f"precompile: {compiled}", err=True)
    measure = tune_measure.Measure(dtypes)
    with _progress() as progress:
        task = progress.add_task("measuring", total=len(keys))

        def done(result: Any) -> None:
            progress.advance(task)
            if result is not None:
                before = "no time" if result.heuristic is None else f"{result.heuristic:.2f}"
                name = tune_measure.name_of(result.key, dtypes)
                progress.console.print(f"{name}: {result.time:.2f} us, heuristic {before} us: {result.config}", highlight=False)

        tuned = tune_module.tune(
            keys, owner, measure, measure.heuristic, again, done, lambda: time.monotonic() - start > limit
        )  # fmt: skip
    rows = [{**asdict(key), **asdict(config), "microseconds": micros} for key, (config, micros) in tuned.entries.items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    typer.echo(f"{len(rows)} configurations for {owner.gpu} in {settings.user_folder() / owner.file_name}", err=True)
    typer.echo(f"tune: {tuned.summary(time.monotonic() - start)}", err=True)
    if tuned.lost:
        sys.stdout.flush()
        os._exit(1)  # at once: without a context, what torch and Triton tear down fails


def _print_audit(rows: list[Any]) -> None:
    heads = ("kernel", "config", "sm", "dtype", "warps", "regs", "spill", "shared", "occ", "load", "store", "mma")
    table = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False, caption="occ: programs an SM holds; load, store: bits at a time")
    for column in table.columns:
        column.no_wrap = True
    for r in rows:
        cells = (r.kernel, r.config, r.arch, r.dtype, r.num_warps, r.registers, r.spill_bytes, r.shared_bytes, r.occupancy)
        style = "red" if r.findings() else None
        table.add_row(*(str(c) for c in (*cells, r.load_bits, r.store_bits, r.mma)), style=style)
    console = Console()
    # A pipe has no width: give the table all it wants rather than fold it.
    console.print(table) if console.is_terminal else Console(width=200).print(table)
