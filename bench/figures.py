"""README's tables of figures, written from bench/results and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import read_text
from .headline import headline_tasks
from .record import KEY, read

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
HEAD = ("op", "case", "pass", "ours, us", "over eager", "over the best peer", "of the limit")


def rewritten(text: str, results: Path) -> str | None:
    """A README's text with the tables of every GPU's folder under results between the two markers; None without markers."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        return None
    tables = "\n\n".join(figures(folder) for folder in sorted(results.glob("*")) if (folder / "machine.json").is_file())
    return f"{text[: start + len(BEGIN)]}\n\n{tables or 'No GPU has been measured yet.'}\n\n{text[end:]}"


def figures(folder: Path) -> str:
    """One GPU's table in Markdown: the headline rows of ours that were measured, and on what."""
    rows = read(folder / "results.csv")
    calls = json.loads(read_text(folder / "machine.json"))["calls"]
    found = {(*(row[k] for k in KEY), row["provider"]): row for row in rows if row["status"] in ("ok", "wrong", "error")}
    lines = [_title(folder, calls), "", _cells(HEAD), "|" + "---|" * len(HEAD)]
    wrong = []
    for task in headline_tasks():
        key = tuple(task.key.values())
        ours = found.get((*key, "ours"))
        if ours is not None and ours["status"] == "ok":
            lines.append(_cells(_line(ours, found.get((*key, "eager")))))
        elif ours is not None:
            wrong.append(f"{' '.join(key)} ({ours['status']})")
    lines += ["", f"Not timed: {'; '.join(wrong)}."] if wrong else []
    return "\n".join(lines)


def _title(folder: Path, calls: Sequence[Mapping[str, Any]]) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(call[name]) for call in calls if call[name]))

    commands = ", ".join(f"`bench/gpu.sh OUT --call {name}`" for name in dict.fromkeys(call["call"] for call in calls))
    return (
        f"**{each('gpu')}**, driver {each('driver')}, CUDA {each('cuda')}, torch {each('torch')}, Triton {each('triton')},"
        f" commit {each('commit')}, {', '.join(dict.fromkeys(str(call['started'])[:10] for call in calls))}; {commands};"
        f" [bench/results/{folder.name}](bench/results/{folder.name}). Ratios are in speed: more than 1 is faster."
    )


def _line(ours: Mapping[str, str], eager: Mapping[str, str] | None) -> Sequence[str]:
    """The cells of one row. A ratio of times that were taken in two ways is not given."""
    alike = eager is not None and eager["status"] == "ok" and eager["method"] == ours["method"]
    over_eager = f"{float(eager['p50_us']) / float(ours['p50_us']):.2f}" if alike and eager is not None else ""
    best = f"{float(ours['ratio_to_best_peer']):.2f} ({ours['best_peer']})" if ours["ratio_to_best_peer"] else ""
    limit = f"{float(ours['percent_of_limit']):.0f} %" if ours["percent_of_limit"] else ""
    case = f"{ours['case']} {ours['dtype']}" + ("" if ours["shape"] in ours["case"] else f" ({ours['shape']})")
    pass_ = ours["pass"] if ours["kind"] == "kernel" else f"{ours['pass']}, {ours['kind']} time"
    return ours["op"], case, pass_, f"{float(ours['p50_us']):.4g}", over_eager, best, limit


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "/") for value in values) + " |"
