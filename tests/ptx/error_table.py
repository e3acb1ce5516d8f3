"""python -m tests.ptx.error_table: how near every op comes to the contract's bound while its approximate instructions err.

Each raw operator, forward and backward, runs as Triton compiled it, with exact results, with results that are 1 and 2 ulp off, and
with the errors that PTX documents; a column's figure is the worst of the errors away from zero, towards it and by hash. It is the
greatest |output - exact| over what the contract allows: at most 1 where the contract holds.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import Op, Sample, contract_error, roles_of
from fused_ops.testing.ptx.approximate import errors
from fused_ops.testing.ptx.gpu import device
from tests.contract import leaves

SPREADS = (1.0, 2.0, 4.0, 16.0)  # of what goes into an exponential: tails where a sigmoid is nearly 1, and where it is nearly 0
LENGTHS = (197, 1000, 4096, 16384)  # of rows
SIGNS = (1, -1, 0)
COLUMNS: dict[str, int | None] = {"exact": 0, "1 ulp": 1, "2 ulp": 2, "documented": None}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Call:
    """A call of an op's public function. name: its activation, or the length of its rows. make: gives its (args, kwargs)."""

    op: Op
    name: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def calls(op: Op, dtype: torch.dtype) -> list[Call]:
    """One call for each activation of an op's samples, its basic sample first, and where there is no product for each of LENGTHS.

    The rows of the input have the SPREADS in turn. The weights of a first product are identities, so that the activation is given
    numbers of these sizes and little but it errs; an fp8 product keeps its weights, and its input's scales have the SPREADS.
    """
    found: dict[str, Sample] = {}
    for sample in (op.example("cpu", dtype), *op.samples("cpu", dtype)):
        activations = [a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, str)]
        for name in activations if found else activations or ["basic"]:
            found.setdefault(name, sample)
    lengths = () if op.roles.multiplies else LENGTHS
    return [
        *(Call(op, name, functools.partial(_spread, op, sample)) for name, sample in found.items()),
        *(Call(op, f"N = {length}", functools.partial(_rows, op, dtype, length)) for length in lengths),
    ]


def _rows(op: Op, dtype: torch.dtype, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(length)
    (x, *others), kwargs = op.bench.make("cpu", (len(SPREADS), length), dtype, None)
    return (_rows_spread(x), *others), kwargs


def _rows_spread(x: Tensor) -> Tensor:
    """x with its rows multiplied by the SPREADS in turn."""
    rows = x.shape[-2] if x.dim() > 1 else 1
    factors = torch.tensor(SPREADS).repeat(-(-rows // len(SPREADS)))[:rows]
    return (x.float() * factors.reshape(-1, *[1] * min(x.dim() - 1, 1))).to(x.dtype)


def _spread(op: Op, sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample's arguments with the SPREADS and identities put in."""
    letters = iter(roles_of(op, sample))
    roles = [next(letters) if isinstance(a, Tensor) else "" for a in sample.args]
    scaled = "q" in roles
    args = list(sample.args)
    for i, (value, role) in enumerate(zip(sample.args, roles)):
        if role == "q" and value.numel() > 1 and i == roles.index("q"):
            args[i] = _rows_spread(value.reshape(-1, 1)).reshape(value.shape)
        elif role == "x" and not scaled:
            args[i] = _rows_spread(value)
        elif role == "w" and not scaled:
            args[i] = torch.eye(*value.shape, dtype=value.dtype)
    return tuple(args), sample.kwargs


class Ratios(TorchDispatchMode):
    """While active, notes how near each output of a raw operator comes to the contract's bound: `worst`, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.worst: dict[str, float] = {}
        self._operators = {raw.overload: raw for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (raw := self._operators.get(func)) is not None:
            outputs = result if isinstance(result, tuple) else (result,)
            for out, expected in zip(outputs, raw.bound(*args), strict=True):
                if expected is not None and out.numel():
                    self.worst[raw.name] = max(self.worst.get(raw.name, 0.0), contract_error(out, expected).max().item())
        return result


def ratios(call: Call, ulps: int | None, sign: int, arch: int = 90) -> dict[str, float]:
    """The worst ratio of each raw operator that a call runs, forward and backward, with approximate instructions that err."""
    given, kwargs = call.make()
    args, wanted = leaves(given) if call.op.trains else (list(given), [])
    with device(arch) as gpu, Ratios() as mode, errors(ulps, sign):
        out = call.op.public(*args, **kwargs)
        if wanted:
            generator = torch.Generator().manual_seed(7)
            torch.autograd.grad(out, wanted, torch.randn(out.shape, generator=generator).to(out.dtype))
    if not gpu.launches:
        raise RuntimeError(f"{call.op.name}, {call.name}: no kernel ran")
    return mode.worst


def rows(ops: list[Op], dtypes: list[str], arch: int) -> Iterator[dict[str, Any]]:
    """The table: one row an op, dtype, call and raw operator."""
    for op in ops:
        for dtype in dtypes:
            for call in calls(op, DTYPES[dtype]):
                table: dict[str, dict[str, float]] = {}
                for column, ulps in COLUMNS.items():
                    for sign in SIGNS if ulps != 0 else (1,):
                        for name, ratio in ratios(call, ulps, sign, arch).items():
                            row = table.setdefault(name, dict.fromkeys(COLUMNS, 0.0))
                            row[column] = max(row[column], ratio)
                for name, row in table.items():
                    yield {"op": op.name, "operator": name, "dtype": dtype, "call": call.name, **row}


def main() -> int:
    """Print the table; 1 where a documented error leads beyond the contract."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.error_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=list(REGISTRY), help="only this op; repeat")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype; repeat")
    parser.add_argument("--arch", type=int, default=90, help="the compute capability: 80 or 90")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    beyond = 0
    if not options.json:
        print(f"{'operator':18} {'dtype':5} {'call':12}" + "".join(f"{column:>12}" for column in COLUMNS))
    for row in rows([REGISTRY[name] for name in options.op or REGISTRY], options.dtype or list(DTYPES), options.arch):
        beyond += row["documented"] > 1
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            figures = "".join(f"{row[column]:>12.3f}" for column in COLUMNS)
            print(f"{row['operator']:18} {row['dtype']:5} {row['call']:12}{figures}", flush=True)
    return int(beyond > 0)


if __name__ == "__main__":
    raise SystemExit(main())
