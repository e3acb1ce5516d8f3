"""No test asserts a time: what a test asserts must hold on a machine that four other programs keep busy.

The cost of the host is asserted as a count of calls, modules or launches; times are measured in bench/.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT

CLOCKS = ("perf_counter", "process_time", "thread_time", "monotonic", "time", "timeit", "repeat", "default_timer", "times")
MODULES = ("time", "timeit", "os", "resource")
LEAST_TIMEOUT = 120
# Where a clock is read although a test runs there, and why no assertion depends on what it says.
ALLOWED = {
    "tests/mutate/clock.py": "how long mutants run, and when they hang: python -m tests.mutate, which no test calls",
    "tests/runtime/stub_driver.py": "its time command is for people; no test calls it",
}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py") if path.relative_to(ROOT).parts[1] != "gpu")


def _names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"t": "time", "now": "time.monotonic"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def _is_clock(called: str, names: dict[str, str]) -> bool:
    head, _, rest = called.partition(".")
    module, _, function = f"{names.get(head, '')}{'.' + rest if rest else ''}".partition(".")
    return (module in MODULES and function.removesuffix("_ns") in CLOCKS) or (module, function) == ("resource", "getrusage")


def _clocks(source: str) -> Iterator[str]:
    """Each line that names a clock: in code, and in the text of a program that a test starts."""
    tree = ast.parse(source)
    names = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and _is_clock(ast.unparse(node), names):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module in ("time", "timeit"):
                if any(f"{module}.{clock}{end}(" in node.value for clock in CLOCKS for end in ("", "_ns")):
                    yield f"line {node.lineno}: {node.value!r}"


def _tight_limits(source: str) -> Iterator[str]:
    """Each timeout that a busy machine may pass, whether of a subprocess or of pytest-timeout."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        limits = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
        limits += node.args[:1] if ast.unparse(node.func).endswith("mark.timeout") else []
        for limit in limits:
            value = constants.get(limit.id) if isinstance(limit, ast.Name) else getattr(limit, "value", None)
            if isinstance(value, (int, float)) and value < LEAST_TIMEOUT:
                yield f"line {node.lineno}: {ast.unparse(limit)} seconds, at least {LEAST_TIMEOUT}"
        deadlines = [k.value for k in node.keywords if k.arg == "deadline" and ast.unparse(node.func).endswith("settings")]
        if ast.unparse(node.func).split(".")[-1] == "settings" and [getattr(d, "value", 0) for d in deadlines] != [None]:
            yield f"line {node.lineno}: hypothesis with a deadline"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_time_is_asserted(path: Path) -> None:
    source = (ROOT / path).read_text()
    clocks = list(_clocks(source)) if path != Path(__file__).relative_to(ROOT) else []
    assert path.as_posix() in ALLOWED or not clocks, clocks
    assert not list(_tight_limits(source))


def test_what_is_allowed_is_there_and_asserts_nothing() -> None:
    for path in ALLOWED:
        source = (ROOT / path).read_text()
        assert list(_clocks(source)), f"{path} reads no clock any more"
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)], path


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndef test_fast():\n    start = time.perf_counter()\n    assert time.perf_counter() - start < 1",
        "from time import monotonic as now\ndef test_fast():\n    assert now() < 1",
        "import time as t\nclock = t.process_time\ndef test_fast():\n    assert clock() < 1",
        "from timeit import timeit\ndef test_fast():\n    assert timeit('f()') < 1",
        "import os\ndef test_fast():\n    assert os.times().user < 1",
        "import time\ndef helper():\n    return time.time_ns()\ndef test_fast():\n    assert helper() < 1",
        "def test_fast():\n    assert float(run('import time; print(time.process_time())')) < 1",
    ],
)
def test_a_clock_is_found(source: str) -> None:
    """The check itself, on tests that it must refuse."""
    assert list(_clocks(source))


@pytest.mark.parametrize(
    "source",
    [
        "run(['make'], timeout=60)",
        "SECONDS = 30\nrun(['make'], timeout=SECONDS)",
        "@pytest.mark.timeout(10)\ndef test_it(): ...",
        "SETTINGS = settings(max_examples=3)",
        "SETTINGS = settings(deadline=200)",
    ],
)
def test_a_tight_limit_is_found(source: str) -> None:
    assert list(_tight_limits(source))


@pytest.mark.parametrize("source", ["run(['make'], timeout=120)", "settings(deadline=None)", "import time\ntime.sleep(1)"])
def test_the_rest_is_left_alone(source: str) -> None:
    assert not list(_clocks(source))
    assert not list(_tight_limits(source))
