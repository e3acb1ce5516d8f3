"""The check of a run's files, field by field, before any of it is filed: see results_format."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fused_ops._runtime.tables import Machine, parse
from fused_ops.kernels.config import has_clusters

from .environment import gpu_folder
from .record import COLUMNS, KEY
from .results_format import CORRECTNESS_COLUMNS, FORMAT, MACHINE_TEXTS, OUTCOMES, STEP_STATUSES, FormatError, Results

STATUSES = ("ok", "wrong", "absent", "unsupported", "skipped", "error")
REQUIRED = (
    *KEY,
    "time",
    "gpu",
    "torch",
    "triton",
    "commit",
    "provider",
    "role",
    "shape",
    "status",
    "reason",
    "p20_us",
    "p50_us",
    "p80_us",
)
POSITIVE = ("p20_us", "p50_us", "p80_us", "gbps", "limit_us", "percent_of_limit", "ratio_to_best_peer")
COUNTS = ("samples", "bytes", "flops", "peak_bytes")
NUMBERS = ("error", "error_limit", "tflops")
MAX_TEXT = 4000  # characters of one field
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:,=-]{0,119}")
_SHAPE = re.compile(r"\d{1,12}(x\d{1,12}){0,7}")
_PATTERNS = {
    "gpu": (re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9 ._()/+-]{1,100}"), "a GPU's name: results are of one"),
    "capability": (re.compile(r"\d{1,3}\.\d{1,3}"), "such as 9.0"),
    "driver": (re.compile(r"[0-9A-Za-z.+_-]{0,60}"), "a version, or nothing"),
    "cuda": (re.compile(r"[0-9A-Za-z.+_-]{0,60}"), "a version, or nothing"),
    "python": (re.compile(r"\d[0-9A-Za-z.+_-]{0,60}"), "a version"),
    "torch": (re.compile(r"\d[0-9A-Za-z.+_-]{0,60}"), "a version"),
    "triton": (re.compile(r"\d[0-9A-Za-z.+_-]{0,60}"), "a version"),
    "commit": (re.compile(r"([0-9A-Za-z]{4,40}\+?)?"), "a commit's hash, with + where files differ from it"),
    "call": (re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}"), "a plan's name"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def check(source: str, files: Mapping[str, bytes]) -> Results:
    """The parsed files of one run. Raises FormatError where one is not as results_format says."""
    texts = {name: _text(f"{source}: {name}", content) for name, content in files.items() if name != "log.txt"}
    machine = check_machine(f"{source}: machine.json", _json(f"{source}: machine.json", texts["machine.json"]))
    results = Results(source, machine, summary=_CONTROL.sub("?", texts.get("summary.md", "")))
    if "results.csv" in texts:
        results.rows = _results(f"{source}: results.csv", texts["results.csv"], machine)
    if "correctness.csv" in texts:
        results.correctness = _correctness(f"{source}: correctness.csv", texts["correctness.csv"])
    if "benchmark.json" in texts:
        results.benchmark = _benchmark(f"{source}: benchmark.json", texts["benchmark.json"])
    if "tuned.json" in texts:
        results.tuned = check_tuned(f"{source}: tuned.json", texts["tuned.json"], machine)
    return results


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: no UTF-8 text: {error}") from None


def _json(where: str, text: str) -> Any:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: no JSON: {error}") from None


def _need(good: bool, where: str, value: object, allowed: str) -> None:
    if not good:
        raise FormatError(f"{where}: got {str(value)[:200]!r}, allowed: {allowed}")


def _time(where: str, value: object) -> datetime:
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        when = None
    _need(isinstance(value, str) and when is not None and when.tzinfo is not None, where, value, "an ISO time with its zone")
    assert when is not None
    return when


def _said(value: str) -> str:
    """What a program said, safe to print: error messages hold anything."""
    return _CONTROL.sub("?", value)[:MAX_TEXT]


def check_machine(where: str, machine: Any) -> dict[str, Any]:
    """machine.json of one run, or FormatError."""
    keys = {"format", *MACHINE_TEXTS, "budget_s", "started", "ended", "steps"}
    _need(type(machine) is dict, where, machine, "an object")
    _need(
        machine.get("format") == FORMAT and type(machine["format"]) is int,
        f"{where}: format",
        machine.get("format"),
        str(FORMAT),
    )
    for name in sorted(set(machine) ^ keys):
        raise FormatError(f"{where}: {name}: {'unknown' if name in machine else 'missing'}")
    for name in MACHINE_TEXTS:
        pattern, allowed = _PATTERNS[name]
        value = machine[name]
        _need(type(value) is str and bool(pattern.fullmatch(value)), f"{where}: {name}", value, allowed)
    _need(gpu_folder(machine["gpu"]) != "cpu", f"{where}: gpu", machine["gpu"], "a GPU's name")
    _number(f"{where}: budget_s", machine["budget_s"])
    started, ended = (_time(f"{where}: {name}", machine[name]) for name in ("started", "ended"))
    _need(started <= ended, f"{where}: ended", machine["ended"], "not before started")
    _need(
        type(machine["steps"]) is list and len(machine["steps"]) <= 100,
        f"{where}: steps",
        machine["steps"],
        "a list of at most 100",
    )
    for i, step in enumerate(machine["steps"]):
        at = f"{where}: steps[{i}]"
        _need(
            type(step) is dict and set(step) == {"name", "status", "seconds", "said"}, at, step, "name, status, seconds, said"
        )
        _need(type(step["name"]) is str and bool(_NAME.fullmatch(step["name"])), f"{at}: name", step["name"], "a step's name")
        _need(step["status"] in STEP_STATUSES, f"{at}: status", step["status"], ", ".join(STEP_STATUSES))
        _number(f"{at}: seconds", step["seconds"])
        _need(type(step["said"]) is str, f"{at}: said", step["said"], "text")
        step["said"] = _said(step["said"])
    return machine


def _number(where: str, value: object) -> None:
    _need(type(value) in (int, float) and math.isfinite(value) and value >= 0, where, value, "a number of at least 0")  # type: ignore[arg-type, operator]


def _table(where: str, text: str, known: Sequence[str], required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(where, row) of a CSV, all known columns there. A last line without its end was cut short, and is dropped."""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise FormatError(f"{where}: no CSV: {error}") from None
    head = lines[0] if lines else []
    for name in head:
        _need(name in known, f"{where}: column", name, ", ".join(known))
    for name in required:
        _need(name in head, f"{where}: columns", ",".join(head), f"{name} among them")
    _need(len(set(head)) == len(head), f"{where}: columns", ",".join(head), "each once")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        at = f"{where}: line {number}"
        _need(len(line) == len(head), at, line, f"{len(head)} fields")
        rows.append((at, {**dict.fromkeys(known, ""), **dict(zip(head, map(_said, line)))}))
    return rows


def _results(where: str, text: str, machine: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = _table(where, text, COLUMNS, REQUIRED)
    for at, row in rows:
        _need(row["status"] in STATUSES, f"{at}: status", row["status"], ", ".join(STATUSES))
        _need(row["role"] in ("ours", "peer"), f"{at}: role", row["role"], "ours, peer")
        _time(f"{at}: time", row["time"])
        for name in ("gpu", "torch", "triton", "commit"):
            _need(row[name] == machine[name], f"{at}: {name}", row[name], f"{machine[name]!r}, as in machine.json")
        timed = row["status"] == "ok"
        for name in (*KEY, "provider"):
            if timed or row[name] or name == "provider":
                _need(bool(_NAME.fullmatch(row[name])), f"{at}: {name}", row[name], "a name")
        if timed or row["shape"]:
            _need(bool(_SHAPE.fullmatch(row["shape"])), f"{at}: shape", row["shape"], "sizes such as 4096x4096")
        for name in (*POSITIVE, *COUNTS, *NUMBERS):
            needed = timed and name in ("p20_us", "p50_us", "p80_us")
            if row[name] or needed:
                _csv_number(f"{at}: {name}", row[name], name)
        if timed:
            low, middle, high = (float(row[name]) for name in ("p20_us", "p50_us", "p80_us"))
            _need(low <= middle <= high, f"{at}: p50_us", row["p50_us"], "between p20_us and p80_us")
    return [row for _, row in rows]


def _csv_number(where: str, text: str, name: str) -> None:
    if name in COUNTS:
        return _need(bool(re.fullmatch(r"\d{1,18}", text)), where, text, "a whole number of at least 0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if name in NUMBERS:
        return _need(value >= 0 or text in ("nan", "inf"), where, text, "a number of at least 0")
    return _need(0 < value < math.inf, where, text, "a number above 0")


def _correctness(where: str, text: str) -> list[dict[str, str]]:
    rows = _table(where, text, CORRECTNESS_COLUMNS, ("test", "outcome", "seconds"))
    for at, row in rows:
        _need(bool(row["test"]), f"{at}: test", row["test"], "a test's id")
        _need(row["outcome"] in OUTCOMES, f"{at}: outcome", row["outcome"], ", ".join(OUTCOMES))
        if row["seconds"]:
            _csv_number(f"{at}: seconds", row["seconds"], "error")
    return [row for _, row in rows]


def _benchmark(where: str, text: str) -> dict[str, Any]:
    content = _json(where, text)
    _need(
        type(content) is dict and type(content.get("benchmarks")) is list, f"{where}: benchmarks", "", "pytest-benchmark's list"
    )
    info = content.get("machine_info", {})
    _need(type(info) is dict, f"{where}: machine_info", info, "an object")
    _need(not info.get("node"), f"{where}: machine_info: node", "(a name)", "empty: the host's name is not published")
    return content


def check_tuned(where: str, text: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    """A table of `fused-ops tune`, of this machine and with configurations that can launch, or FormatError."""
    table = _json(where, text)
    _need(type(table) is dict and {"gpu", "triton"} <= set(table), where, table, "a table of configurations")
    for name in ("gpu", "triton"):
        _need(table[name] == machine[name], f"{where}: {name}", table[name], f"{machine[name]!r}, as in machine.json")
    try:
        parse(text, table_owner(table, machine["capability"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{where}: entries: {error}") from None
    return table


def table_owner(table: Mapping[str, Any], capability: str) -> Machine:
    """The Machine that a tuned table is for. capability: such as "9.0"."""
    version = re.match(r"(\d+)\.(\d+)", str(table["triton"]))
    major, minor = map(int, capability.split("."))
    clusters = version is not None and has_clusters((major, minor), (int(version[1]), int(version[2])))
    return Machine(str(table["gpu"]), str(table["triton"]), clusters)
