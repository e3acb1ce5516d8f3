"""What fuse covers: python -m tests.fuse.coverage [--output FILE] [--models NAME ...] [--attention eager]

Makes tiny random models of the architectures of transformers and timm (tests/fuse/zoo.py), fuses each, compares the forward
before and after in fp64, counts what one forward in fp32 computes by kind, and writes a table in Markdown. Some minutes.

It needs an environment of its own, here named "coverage"; any other name does as well:

    python3 -m venv coverage
    coverage/bin/python -m pip install -c constraints.txt -e '.[dev]'
    coverage/bin/python -m pip install --no-deps -r tests/fuse/requirements.txt
    coverage/bin/python -m tests.fuse.coverage --output coverage.md
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_ops import fuse
from fused_ops._fuse.count import KINDS, count
from tests.fuse.zoo import FIRST, NAMES, make

Counts = dict[str, tuple[int, int]]
BOUNDS = {"float64": 1e-6, "float32": 1e-4}  # of the largest element: many models round to fp32 on their way in fp64 too
ROOT = Path(__file__).resolve().parents[2]
PINS = ("constraints.txt", "tests/fuse/requirements.txt")


@dataclass
class Row:
    """One model: what was counted, before and after fuse, the largest relative difference, and what went wrong."""

    name: str
    before: Counts = field(default_factory=dict)
    after: Counts = field(default_factory=dict)
    difference: float = 0.0
    dtype: str = "float64"
    agrees: bool | None = None
    said: Counts = field(default_factory=dict)
    failure: str = ""

    @property
    def equal(self) -> bool:
        """Whether the fused forward is the unfused one, but for roundings."""
        return self.difference <= BOUNDS[self.dtype]

    @property
    def notes(self) -> Iterator[str]:
        """What a reader must know of this row, besides its numbers."""
        if self.failure:
            yield self.failure
            return
        if self.dtype != "float64":
            yield f"compared in {self.dtype}: the model does not run in fp64"
        if not self.equal:
            yield f"NOT EQUAL: {self.difference:.1e}"
        if any(fused for fused, _ in self.before.values()):
            yield "fused operators before fuse"
        changed = [kind for kind in KINDS if self.before[kind][1] != self.after[kind][1]]
        yield from (f"the report has {kind} {done}/{total}" for kind, (done, total) in self.said.items())
        yield from (f"{kind} was 0/{self.before[kind][1]} before fuse" for kind in changed)


def measured(name: str, attention: str | None) -> Row:
    """Make a model, run it, fuse it, run it again, and count."""
    row = Row(name)
    stage = "made"
    try:
        model, inputs = make(name, attention)
        counted = copy.deepcopy(model)
        stage = "counted"
        row.before = count(counted, (), inputs)
        stage = "fused"
        report = fuse(counted)
        row.after = count(counted, (), inputs)
        stage = "asked for its coverage"
        said, found = report.coverage(), report.coverage(**inputs)
        row.agrees = _occurring(said) == _occurring(found)
        row.said = {kind: said[kind] for kind in said if said[kind] != found[kind]}
        stage = "run"
        model, inputs, expected = _in_fp64(model, inputs)
        row.dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
        stage = "run after fuse"
        fuse(model)
        row.difference = difference(_run(model, inputs), expected)
    except Exception as error:
        row.failure = f"could not be {stage}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


def _in_fp64(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    """The model and its inputs in fp64, or in fp32 where it runs in that alone, and its outputs."""
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    try:
        expected = _run(model.double(), doubled)
        if not any(t.isnan().any() for t in expected):
            return model, doubled, expected
    except RuntimeError:  # a dtype is written into its code
        pass
    return model, inputs, _run(model.float(), inputs)


def _run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, over the largest element of its tensor.

    inf where shapes differ, where infinities or NaNs do, and where there is no finite element to compare.
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    differences = []
    for a, b in zip(found, expected):
        same, finite = (a == b) | (a.isnan() & b.isnan()), a.isfinite() & b.isfinite()
        if not (same | finite).all():
            return float("inf")
        if finite.any():
            scale = b[finite].abs().max().clamp_min(torch.finfo(b.dtype).tiny)
            differences.append(float((a - b)[finite].abs().max() / scale))
    return max(differences, default=float("inf"))


def _occurring(counts: Counts) -> Counts:
    return {kind: counts[kind] for kind in KINDS if counts.get(kind, (0, 0))[1]}


def totals(rows: Sequence[Row]) -> Counts:
    """The sums of what was counted after fuse, of the models that ran."""
    return {kind: tuple(sum(row.after[kind][i] for row in rows) for i in (0, 1)) for kind in KINDS}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A table in Markdown: fused/all by kind, one row a model, and the sums first."""
    ran = [row for row in rows if not row.failure]
    yield f"| model | {' | '.join(kind.replace('_', ' ') for kind in KINDS)} | difference | report agrees | notes |"
    yield f"|---|{'---:|' * len(KINDS)}---:|---|---|"
    agreeing = [row.agrees for row in ran if row.agrees is not None]
    said = f"{sum(agreeing)} of {len(agreeing)}" if agreeing else "-"
    largest = max((row.difference for row in ran), default=0.0)
    yield f"| **{len(ran)} models** | {_cells(totals(ran))} | {largest:.1g} | {said} | |"
    for row in rows:
        agrees = {None: "-", True: "yes", False: "NO"}[row.agrees]
        cells = (
            f"{_cells(row.after)} | {row.difference:.1g} | {agrees}"
            if not row.failure
            else " | ".join(["-"] * (len(KINDS) + 2))
        )
        yield f"| {row.name} | {cells} | {'; '.join(row.notes)} |"


def _cells(counts: Counts) -> str:
    return " | ".join(f"{fused}/{total}" if total else "" for fused, total in (counts[kind] for kind in KINDS))


def markdown(rows: Sequence[Row], versions: dict[str, str], attention: str | None) -> str:
    """The whole document."""
    first = [row for row in rows if row.name in FIRST]
    rest = [row for row in rows if row.name not in FIRST]
    lines = [
        "# What fuse covers",
        "",
        f"Written by `python -m tests.fuse.coverage{f' --attention {attention}' if attention else ''}` with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ", on a CPU.",
        "",
        "Tiny models with random weights, two layers where the architecture allows, one forward in eval mode. In each cell: what a"
        " fused operator computes / all of its kind. difference: the fused forward from the unfused one, in fp64, over the largest"
        " element. report agrees: `report.coverage()` says the same as the count. A linear is counted where an activation follows;"
        " a softmax inside `scaled_dot_product_attention` is not counted.",
    ]
    for title, part in (("The most used", first), ("Others", rest)):
        if part:
            lines += ["", f"## {title}", "", *table(part)]
    return "\n".join(lines) + "\n"


def pins() -> dict[str, str]:
    """{package: version} that this command runs with, from the files that pin them."""
    text = "\n".join((ROOT / path).read_text() for path in PINS)
    wanted: dict[str, str] = {}
    for name, version, above in re.findall(
        r"^(torch|transformers|timm)==([\w.]+)(?:; python_version >= \"([\d.]+)\")?", text, re.M
    ):
        if not above or sys.version_info[:2] >= tuple(int(n) for n in above.split(".")):
            wanted.setdefault(name, version)
    return wanted


def mismatches(wanted: dict[str, str]) -> Iterator[str]:
    """What is missing, or there in another version."""
    for name, version in wanted.items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            yield f"{name}=={version} is needed, and is {found}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuse.coverage", description="What fuse covers, as Markdown.")
    parser.add_argument("--output", type=Path, help="a file for the table; standard output without it")
    parser.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or patterns: BertModel, 'timm/*'")
    parser.add_argument("--attention", choices=["eager"], help="eager: attention whose softmax is computed by itself")
    options = parser.parse_args(argv)
    names = [name for name in NAMES if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.models)]
    unknown = [pattern for pattern in options.models if not any(fnmatch.fnmatchcase(name, pattern) for name in NAMES)]
    if unknown:
        parser.error(f"no model is named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    wanted = pins()
    if not any(name.startswith("timm/") for name in names):
        del wanted["timm"]
    if wrong := list(mismatches(wanted)):
        install = (__doc__ or "").split("\n\n", 2)[2]
        parser.exit(2, "\n".join([*wrong, "", install]))
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    rows = []
    for i, name in enumerate(names, 1):
        rows.append(measured(name, options.attention))
        print(f"{i}/{len(names)} {name} {'; '.join(rows[-1].notes)}", file=sys.stderr, flush=True)
    text = markdown(rows, wanted, options.attention)
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
    return 1 if any(row.failure or not row.equal for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
