"""Results of one GPU's runs, checked and merged, filed under bench/results/<gpu>/; its tuned table; README's figures.

Everything is made in a folder of its own first, and moved into place at the end: what was filed before survives a failure.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_ops._runtime.tuned_kernels import KERNELS, source_hash
from fused_ops._tools.headline_table import table_of

from .environment import ROOT, gpu_folder
from .figures import rewritten
from .files import lines, read_text
from .forecast import NEXT, RESIDUAL_COLUMNS, read_forecast, residuals, said_of, table
from .record import COLUMNS, KEY, annotate, read
from .results_check import table_owner
from .results_format import CORRECTNESS_COLUMNS, FORMAT, FormatError, Results, write_whole
from .results_load import load

MADE = ("results.csv", "correctness.csv", "benchmark.json", "machine.json", "summary.md", "residuals.csv", "report.html")
SAME = ("gpu", "capability", "torch", "triton")  # of all runs that are merged
WEAK = ("absent", "skipped")  # a later row of these says nothing about an earlier measurement


@dataclass
class Published:
    """What publish did: the folder, and what there is to say, a line each. warnings: what was left out."""

    folder: Path
    said: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def publish(paths: Iterable[Path], root: Path = ROOT, add: bool = False, replace: bool = False, commit: str = "") -> Published:
    """File the results in paths, runs of one GPU, under root/bench/results/.

    Args:
        paths: folders that bench/gpu.sh wrote, or their results.tar.gz.
        root: the checkout.
        add: keep what is filed for this GPU already, as the earliest run. replace: drop it. Neither: refuse, where it holds
            a run that is not among paths.
        commit: for runs that do not say their commit.

    Raises:
        FormatError: a file is not as results_format says, or the runs do not go together.
    """
    runs = _runs(paths, commit)
    target = root / "bench" / "results" / gpu_folder(runs[0].machine["gpu"])
    filed = _filed(target)
    given = {_identity(run.machine) for run in runs}
    if filed is not None and not replace and {_identity(c) for c in filed.machine["calls"]} - given:
        if not add:
            raise FormatError(f"{target}: holds runs that are not given: give them too, or --add to keep them, or --replace")
        earlier = [call for call in filed.machine["calls"] if _identity(call) not in given]
        _require_alike([*earlier, *(run.machine for run in runs)])
    else:
        filed, earlier = None, []
    done = Published(target)
    sources = ([filed] if filed is not None else []) + runs
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if target.is_dir():
            _keep(target, staging)
            if replace and (staging / NEXT).is_file():
                os.replace(staging / NEXT, staging / "forecast.csv")
        counts = table_of(runs[-1].machine["triton"])  # of the kernels that were measured: bench fit reads it
        if counts.is_file() and (replace or not (staging / "counts.csv").is_file()):
            shutil.copyfile(counts, staging / "counts.csv")
        _fill(staging, sources, [*earlier, *(run.machine for run in runs)], done)
        tuned = _tuned(runs, done)
        staging.chmod(0o755)
        _swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if tuned is not None:
        name, text = tuned
        configs = root / "fused_ops" / "configs"
        configs.mkdir(exist_ok=True)
        write_whole(configs / name, text.encode())
        done.said.append(f"wrote {configs / name}")
    _rewrite_readme(root, done)
    made = ", ".join(name for name in (*MADE, "residuals.png") if (target / name).is_file())
    done.said.insert(0, f"wrote {target}: {made}, {len(list(target.glob('*.png')))} pictures")
    return done


def _runs(paths: Iterable[Path], commit: str) -> list[Results]:
    """The runs in order of their start, each once, all of one GPU and one installation, each of a clean commit."""
    runs: dict[tuple[str, ...], Results] = {}
    for path in paths:
        run = load(path)
        said = run.machine["commit"] or commit
        if not said or not said.isalnum():
            why = "was run from a checkout with changes" if said else "does not say its commit: give --commit"
            raise FormatError(f"{run.source}: machine.json: commit: got {said!r}: it {why}")
        for holder in (run.machine, *run.rows):
            holder["commit"] = said
        runs[_identity(run.machine)] = run
    if not runs:
        raise FormatError("no results are given")
    ordered = sorted(runs.values(), key=lambda run: str(run.machine["started"]))
    _require_alike([run.machine for run in ordered])
    return ordered


def _identity(machine: Mapping[str, Any]) -> tuple[str, ...]:
    return machine["call"], machine["started"]


def _require_alike(machines: Sequence[Mapping[str, Any]]) -> None:
    for name in SAME:
        values = list(dict.fromkeys(machine[name] for machine in machines))
        if len(values) > 1:
            raise FormatError(f"machine.json: {name}: the runs differ: {', '.join(values)}; they are never merged")


def _filed(folder: Path) -> Results | None:
    """What is filed in folder already, or None."""
    if not (folder / "machine.json").is_file():
        return None
    filed = Results(str(folder), json.loads(read_text(folder / "machine.json")))
    filed.rows = read(folder / "results.csv") if (folder / "results.csv").is_file() else []
    if (folder / "correctness.csv").is_file():
        filed.correctness = list(csv.DictReader(lines(folder / "correctness.csv")))
    if (folder / "benchmark.json").is_file():
        filed.benchmark = json.loads(read_text(folder / "benchmark.json"))
    return filed


def _keep(folder: Path, staging: Path) -> None:
    """Copy what publish does not make, such as forecast.csv."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in MADE and path.suffix != ".png":
            shutil.copyfile(path, staging / path.name)


def merged(sources: Sequence[Results]) -> list[dict[str, str]]:
    """The rows of all runs, the later of equal measurements; ratios and goals anew. Every roofline row is kept: a run
    measures it more than once."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for source in sources:
        for row in source.rows:
            key = (*(row[k] for k in KEY), row["provider"], row["time"] if row["kind"] == "roofline" else "")
            if key in rows and row["status"] in WEAK and rows[key]["status"] not in WEAK:
                continue
            rows.pop(key, None)
            rows[key] = {k: "" if k in ("best_peer", "ratio_to_best_peer", "goal", "met") else row.get(k, "") for k in COLUMNS}
    here = {row["provider"] for row in rows.values() if row["status"] != "absent"}
    return annotate(row for row in rows.values() if row["status"] != "absent" or row["op"] or row["provider"] not in here)


FOLDERS = re.compile(r"(?<![\w.:/])(?:/[\w.+-]+)+/")


def without_folders(text: str) -> str:
    """A message without the folders of the machine that it came from: /a/b/x.py is .../x.py. Web addresses stay."""
    return FOLDERS.sub(".../", text)


def _fill(staging: Path, sources: Sequence[Results], calls: Sequence[Mapping[str, Any]], done: Published) -> None:
    """Write every file of the folder."""
    rows = [{**row, "reason": without_folders(str(row.get("reason", "")))} for row in merged(sources)]
    (staging / "results.csv").write_text(table(COLUMNS, rows))
    tests = {
        row["test"]: {**row, "message": without_folders(row["message"])} for source in sources for row in source.correctness
    }
    if tests:
        (staging / "correctness.csv").write_text(table(CORRECTNESS_COLUMNS, tests.values()))
    _benchmark(staging, [source.benchmark for source in sources if source.benchmark])
    (staging / "machine.json").write_text(json.dumps({"format": FORMAT, "calls": list(calls)}, indent=1) + "\n")
    off: list[dict[str, str]] = []
    if (staging / "forecast.csv").is_file():
        off = residuals(read_forecast(staging / "forecast.csv"), rows)
        (staging / "residuals.csv").write_text(table(RESIDUAL_COLUMNS, off))
    else:
        done.warnings.append("no forecast.csv was filed before the run: no residuals")
    (staging / "summary.md").write_text(summary(calls, list(tests.values()), rows, off))
    _draw(staging, rows, off, str(calls[-1]["gpu"]), done)


def _benchmark(staging: Path, parts: Sequence[dict[str, Any]]) -> None:
    """One pytest-benchmark file, without every single sample, whose quantiles are kept, and what the machine is said once."""
    if parts:
        machine = {k: v for k, v in dict(parts[-1].get("machine_info") or {}).items() if k != "release"}
        benchmarks = [entry for part in parts for entry in part["benchmarks"]]
        for entry in benchmarks:
            if isinstance(entry, dict) and isinstance(entry.get("stats"), dict):
                entry["stats"].pop("data", None)
            if isinstance(entry, dict) and isinstance(entry.get("extra_info"), dict):
                entry["extra_info"] = {k: v for k, v in entry["extra_info"].items() if k not in machine or machine[k] != v}
        each = [json.loads(text) for text in dict.fromkeys(json.dumps(entry) for entry in benchmarks)]
        (staging / "benchmark.json").write_text(
            json.dumps({**parts[-1], "machine_info": machine, "benchmarks": each}, separators=(",", ":"))
        )


def summary(
    calls: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, str]],
    off: Sequence[Mapping[str, str]],
) -> str:  # fmt: skip
    """summary.md: the steps of every run, what failed, and how far off the forecast was."""
    lines = [f"# {calls[-1]['gpu']}", ""]
    for call in calls:
        lines += [f"## {call['call']}, {call['started']} to {call['ended']}", ""]
        lines += [f"- {k}: {call[k]}" for k in ("driver", "cuda", "python", "torch", "triton", "commit", "budget_s") if call[k]]
        lines += ["", "| step | status | seconds | said |", "|---|---|---|---|"]
        lines += [f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {_one_line(s['said'])} |" for s in call["steps"]] + [
            ""
        ]
    if tests:
        counts = Counter(row["outcome"] for row in tests)
        lines += ["## Correctness", "", ", ".join(f"{n} {name}" for name, n in counts.most_common()) + ".", ""]
        bad = [row for row in tests if row["outcome"] not in ("passed", "skipped")]
        lines += [f"- {r['outcome']}: `{r['test']}` {r['kernel']} {_one_line(r['message'])[:200]}" for r in bad[:100]]
        lines += [f"- and {len(bad) - 100} more, in correctness.csv"] if len(bad) > 100 else []
        lines.append("")
    counts = Counter((row["role"], row["status"]) for row in rows if row["kind"])
    lines += ["## Measurements", "", ", ".join(f"{role} {status}: {n}" for (role, status), n in sorted(counts.items())) + "."]
    wrong = [row for row in rows if row["role"] == "ours" and row["status"] in ("wrong", "error")]
    lines += ["", *(f"- {r['status']}: {' '.join(r[k] for k in KEY)}: {_one_line(r['reason'])[:200]}" for r in wrong)]
    if off:
        lines += ["", "## Forecast", "", *said_of(off)]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _draw(
    staging: Path, rows: Sequence[Mapping[str, str]], off: Sequence[Mapping[str, str]], gpu: str, done: Published
) -> None:
    """report.html and the pictures, where pandas and matplotlib are there."""
    if not any(row["status"] == "ok" for row in rows):
        return
    try:
        from .report import write_report
        from .report.residuals import residual_picture
        from .report.style import plt
    except ModuleNotFoundError as error:
        done.warnings.append(f"no report: {error.name} is not installed: pip install 'fused-ops[bench]'")
        return
    write_report(staging / "results.csv", staging)
    if (picture := residual_picture(off, gpu)) is not None:
        picture.savefig(staging / "residuals.png")
        plt.close(picture)


def _tuned(runs: Sequence[Results], done: Published) -> tuple[str, str] | None:
    """(file name, text) of the runs' tuned table, later entries for earlier ones; None where there is none to ship."""
    tables = []
    for run in runs:
        if run.tuned is None:
            continue
        entries = [e for e in run.tuned["entries"] if e["kernel"] in KERNELS and e["source"] == source_hash(e["kernel"])]
        if stale := len(run.tuned["entries"]) - len(entries):
            done.warnings.append(
                f"{run.source}: tuned.json: {stale} entries: source: not that of the kernels as they are: not shipped"
            )
        if entries:
            tables.append((run.tuned | {"entries": entries}, run.machine["capability"]))
    if not tables:
        return None
    entries = {tuple(e[k] for k in ("kernel", "M", "N", "itemsize")): e for content, _ in tables for e in content["entries"]}
    last, capability = tables[-1]
    whole = {**{k: last[k] for k in ("gpu", "triton")}, "entries": list(entries.values())}
    return table_owner(last, capability).file_name, json.dumps(whole, indent=1) + "\n"


def _swap(staging: Path, target: Path) -> None:
    """Put staging in target's place; target as it was, if that fails."""
    old = staging.with_name(staging.name + ".old")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _rewrite_readme(root: Path, done: Published) -> None:
    readme = root / "README.md"
    text = read_text(readme) if readme.is_file() else ""
    new = rewritten(text, root / "bench" / "results")
    if new is None:
        done.warnings.append("README.md has no <!-- figures --> and <!-- /figures -->: it was left as it is")
    elif new != text:
        write_whole(readme, new.encode())
        done.said.append(f"rewrote the figures in {readme}")
