"""The command `fused-ops forecast`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}


def register(app: typer.Typer) -> None:
    """Add this module's command to the app."""
    app.command()(forecast)


def forecast(
    op: Annotated[str, typer.Argument(help="The op's name, as softmax, layer_norm, linear, gated_linear, mlp.")],
    sizes: Annotated[list[int], typer.Argument(min=1, help="M N of rows, M N K of a product.")],
    gpu: Annotated[str, typer.Option(help="h100 or h200, or their full names.")] = "h100",
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp8.")] = "bf16",
    pass_: Annotated[str, typer.Option("--pass", help="fwd, train_fwd, bwd or fwd+bwd.")] = "fwd",
    activation: Annotated[str, typer.Option(help="Of a product.")] = "none",
    wall: Annotated[bool, typer.Option(help="The time of an eager call, host time counted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON.")] = False,
) -> None:
    """Say how long one call should take on a GPU, and what limits it. No GPU is needed, and nothing is measured."""
    from ..._tools.forecast import GPUS, gpu_named
    from ..._tools.forecast import forecast as forecast_of
    from ..._tools.forecast.model import ACTIVATIONS, PASSES, SIZES

    known = gpu_named(gpu)
    if known is None:
        raise typer.BadParameter(f"got {gpu!r}, allowed: {', '.join(GPUS)}", param_hint="--gpu")
    if op not in SIZES:
        raise typer.BadParameter(f"got {op!r}, allowed: {', '.join(SIZES)}", param_hint="OP")
    if len(sizes) != SIZES[op]:
        raise typer.BadParameter(f"{op}: got {len(sizes)} sizes, allowed: {SIZES[op]}", param_hint="SIZES")
    for hint, value, allowed in (
        ("--dtype", dtype, tuple(ITEMSIZES)),
        ("--pass", pass_, PASSES),
        ("--activation", activation, ("none", *ACTIVATIONS)),
    ):
        if value not in allowed:
            raise typer.BadParameter(f"got {value!r}, allowed: {', '.join(allowed)}", param_hint=hint)
    if (dtype == "fp8") != (op == "linear_fp8"):
        raise typer.BadParameter("fp8 is linear_fp8's, which takes no other", param_hint="--dtype")
    kind = "wall" if wall else "kernel"
    try:
        found = forecast_of(op, tuple(sizes), ITEMSIZES[dtype], pass_, known, kind=kind, activation=activation)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--pass") from None
    launches = [{"name": part.name, "seconds": part.seconds, "binding": part.binding} for part in found.launches]
    if as_json:
        answer = {"gpu": known.name, "seconds": found.seconds, "binding": found.binding, "launches": launches}
        typer.echo(json.dumps(answer, indent=1))
        return
    typer.echo(f"{found.seconds * 1e6:.1f} us on {known.name}, limited by {found.binding}: a forecast, not a measurement")
    for part in launches:
        typer.echo(f"  {part['name']:<16} {float(part['seconds']) * 1e6:8.1f} us  {part['binding']}")  # type: ignore[arg-type]
