"""The command `fused-ops doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False) -> None:
    """Say what this installation runs and why: versions, GPU, the backend of each op, export targets, caches.

    Exits with 1 if a variable of the environment was refused, if there is a GPU but the kernels cannot run on it, or if
    FUSED_OPS_BACKEND asks for what is not possible.

    Example: fused-ops doctor --json | jq .ops
    """
    from ..._tools.doctor import installation

    found = installation()
    problems = _problems(found)
    if as_json:
        typer.echo(json.dumps(found | {"problems": problems}, indent=1))
    else:
        _print(found, problems)
    raise typer.Exit(1 if problems else 0)


def _problems(found: dict[str, Any]) -> list[str]:
    problems = ["{variable}: got {got!r}, allowed: {allowed}".format(**refusal) for refusal in found["refused"]]
    problems += [f"{op['op']}: {op['reason']}" for op in found["ops"] if op["backend"] == "refused"]
    gpu = found["gpu"]
    if gpu["available"] and found["packages"]["triton"] is None:
        problems.append("there is a GPU but no Triton: pip install triton")
    problems += [
        f"{d['name']}: compute capability {d['capability']}, the kernels need 8.0 or later"
        for d in gpu.get("devices", [])
        if not d["supported"]
    ]
    return problems


def _print(found: dict[str, Any], problems: list[str]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=200)  # a pipe has no width: fold nothing

    def table(title: str, heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        grid = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", show_header=any(heads))
        for row in rows:
            grid.add_row(*(escape(str(cell)) for cell in row))
        console.print(grid)

    gpu = found["gpu"]
    machine = [("Python", found["python"])]
    machine += [(name, version or "not installed") for name, version in found["packages"].items()]
    if gpu["available"]:
        machine += [
            ("GPU", f"{d['name']}, capability {d['capability']}, {d['sms']} SMs, {d['memory_bytes'] / 2**30:.0f} GiB")
            for d in gpu["devices"]
        ]
        machine.append(("CUDA", f"{gpu['cuda']} in PyTorch, driver {gpu['driver'] or 'unknown'}"))
    else:
        machine.append(("GPU", f"none: {gpu['why']}"))
    machine += [
        (name, ", ".join(value) or "none" if isinstance(value, list) else value) for name, value in found["settings"].items()
    ]
    machine.append(("launches", "{way}: {reason}".format(**found["launches"])))
    table("Installation", ("", ""), machine)
    if found["refused"]:
        rows = [(each["variable"], repr(each["got"]), each["allowed"]) for each in found["refused"]]
        table("Refused: import fused_ops raises SettingError", ("variable", "got", "allowed"), rows)
    if found["unknown"]:
        unknown = [(each["variable"], each["nearest"] or "-") for each in found["unknown"]]
        table("Variables that this version does not read", ("variable", "did you mean"), unknown)
    ops = [(o["op"], o["device"], o["backend"], o["reason"], o["when_compiling"]) for o in found["ops"]]
    table("Ops", ("op", "tensors on", "runs", "why", "under torch.compile"), ops)
    libraries = [
        (r["for"], r["activations"], r["dtypes"], str(r["from_rows"]), r["computes"], r["why"]) for r in found["libraries"]
    ]
    table("Products that a library computes on a GPU", ("for", "activation", "of", "from rows", "computes", "why"), libraries)
    exports = [
        (e["target"], "yes" if e["available"] else "no", ", ".join(e["missing"]) or "-", e["install"] or "-")
        for e in found["exports"]
    ]
    table("Export targets", ("target", "available", "missing", "to get it"), exports)
    caches = [(c["cache"], c["path"], "in use" if c["exists"] else "empty") for c in found["caches"]]
    table("Caches", ("cache", "folder", "state"), caches)
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    console.print("no problems" if not problems else f"{len(problems)} problems")
