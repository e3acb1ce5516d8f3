"""bench.correctness on small test files made here: a crash, a hang, a lost context and a wrong number each cost one test."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import correctness, sanitize
from bench.correctness_plugin import MESSAGE, short
from bench.environment import alone

ROOT = Path(__file__).resolve().parents[2]
GOOD = "\n\n@pytest.mark.parametrize('i', range({n}))\ndef test_good{name}(i): assert i >= 0\n"
HEAD = "import os, signal, time, pytest\n"
CONFTEST = """
import os, pathlib
from bench import correctness_plugin

LOST = pathlib.Path(__file__).with_name("lost")  # while it is there, this worker's context counts as lost

def error():
    if not LOST.exists():
        return ""
    LOST.unlink()
    return "CUDA error: an illegal memory access was encountered"

correctness_plugin.device_error = error
"""
LOSES = """
def test_loses():
    import pathlib
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        raise RuntimeError("Triton Error [CUDA]: illegal memory access: softmax_fwd_kernel, grid (3,)")
    pathlib.Path(__file__).with_name("lost").touch()
"""


def start(folder: Path, *options: str, paths: tuple[str, ...] = ("",), plugins: bool = False) -> subprocess.Popen[str]:
    """bench.correctness over the test files in folder, or those named; its CSV is folder/out/c.csv.

    An ini file makes folder the root of their names, wherever this checkout is. plugins: workers load the plugins that are
    installed, as a user's do; without them a worker starts in a sixth of the time.
    """
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "bench.correctness", str(folder / "out" / "c.csv"), "--allow-cpu", *options]
    environment = {**alone(), "PYTEST_ADDOPTS": "-n 3", "PYTEST_XDIST_WORKER": "gw0", "PYTHONPATH": str(ROOT)}
    environment |= {} if plugins else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.Popen(
        [*command, *(str(folder / path) for path in paths)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment,
    )  # fmt: skip


def run(folder: Path, *options: str, paths: tuple[str, ...] = ("",), plugins: bool = False) -> tuple[int, str]:
    """(exit status, the output)."""
    process = start(folder, *options, paths=paths, plugins=plugins)
    return process.wait() if (out := process.communicate()[0]) is None else process.returncode, out


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """The CSV by the tests' names, without their file."""
    with (folder / "out" / "c.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({line["test"] for line in lines}) == len(lines)
    return {line["test"].partition("::")[2] or line["test"]: line for line in lines}


def outcomes(folder: Path) -> dict[str, list[str]]:
    """Outcome -> the tests that had it, those called good as one word each."""
    found: dict[str, list[str]] = {}
    for name, line in rows(folder).items():
        found.setdefault(line["outcome"], []).append("good" if "good" in name else name)
    return found


def write(folder: Path, body: str, name: str = "test_a.py", n: int = 4) -> None:
    (folder / name).write_text(HEAD + GOOD.format(n=n, name="_before") + body + GOOD.format(n=n, name="_after"))


BAD = """
def test_segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def test_exit(): os._exit(7)
def test_hang(): time.sleep(3600)
def test_wrong(): assert 1 == 2, "softmax_fwd_kernel: two numbers"
def test_system_exit(): raise SystemExit(3)
@pytest.fixture
def broken(): raise OSError("no")
def test_setup(broken): pass
@pytest.fixture
def breaks():
    yield
    raise OSError("at the end")
def test_teardown(breaks): pass
"""
BAD_OUTCOMES = {
    "test_segfault": ("lost", "killed by SIGSEGV; at test_a.py:7 test_segfault"),
    "test_exit": ("lost", "exit status 7"),
    "test_hang": ("hang", "no end after 10 s; at test_a.py:9 test_hang"),
    "test_wrong": ("failed", "AssertionError: softmax_fwd_kernel: two numbers"),
    "test_system_exit": ("failed", "SystemExit: 3"),
    "test_setup": ("error", "OSError: no"),
    "test_teardown": ("error", "OSError: at the end"),
}


@pytest.mark.slow
def test_each_bad_test_costs_itself(tmp_path: Path) -> None:
    """A crash, an exit, a hang, a wrong number and broken fixtures, among good tests that all pass."""
    write(tmp_path, BAD)
    status, out = run(tmp_path, "--processes", "2", "--timeout", "10")
    assert status == 1, out
    lines = rows(tmp_path)
    assert {name: line["outcome"] for name, line in lines.items()} == {
        **{name: "passed" for name in lines if "good" in name},
        **{name: outcome for name, (outcome, _) in BAD_OUTCOMES.items()},
    }
    assert len(lines) == 8 + len(BAD_OUTCOMES)
    for name, (_, says) in BAD_OUTCOMES.items():
        assert lines[name]["message"].startswith(says), name
        assert lines[name]["kernel"] == ("softmax_fwd_kernel" if name == "test_wrong" else ""), name
    assert "correctness: 8 passed, 2 failed, 2 error, 2 lost, 1 hang, 0 skipped, 0 not run in" in out.splitlines()[-1]
    assert "; first: test_a.py::test_" in out.splitlines()[-1]


def test_a_lost_context_ends_one_worker_and_the_kernel_is_named(tmp_path: Path) -> None:
    """The test passes, the device then raises; run again with CUDA_LAUNCH_BLOCKING=1 the launch itself raises."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    write(tmp_path, LOSES)
    status, out = run(tmp_path, "--processes", "1")
    assert status == 1, out
    assert outcomes(tmp_path) == {"passed": ["good"] * 8, "lost": ["test_loses"]}
    lost = rows(tmp_path)["test_loses"]
    assert lost["kernel"] == "softmax_fwd_kernel"
    assert "the context is lost: CUDA error" in lost["message"]
    assert "again with CUDA_LAUNCH_BLOCKING=1: failed" in lost["message"]
    assert "first: test_a.py::test_loses: softmax_fwd_kernel: " in out.splitlines()[-1]
    workers = [line["worker"] for line in rows(tmp_path).values()]
    assert len(set(workers)) == 2, "the worker was not replaced, or others were"


def test_out_of_memory_is_tried_again_alone(tmp_path: Path) -> None:
    flag = tmp_path / "tried"
    once = f"""
def test_large():
    import pathlib
    if not pathlib.Path({str(flag)!r}).exists():
        pathlib.Path({str(flag)!r}).touch()
        raise MemoryError("CUDA out of memory. Tried to allocate 9 GiB")

def test_too_large(): raise MemoryError("CUDA out of memory. Tried to allocate 99 GiB")
"""
    write(tmp_path, once)
    status, out = run(tmp_path, "--processes", "2")
    assert status == 1, out
    assert outcomes(tmp_path)["failed"] == ["test_too_large"]
    assert sorted(outcomes(tmp_path)["passed"]) == ["good"] * 8 + ["test_large"]
    assert "alone, after it had run out of memory" in rows(tmp_path)["test_too_large"]["message"]


def test_a_file_that_cannot_be_imported_leaves_the_others(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "test_b.py").write_text("import no_such_module_here\n")
    status, out = run(tmp_path, "--processes", "2")
    assert status == 1, out
    assert outcomes(tmp_path) == {"error": ["test_b.py (not collected)"], "passed": ["good"] * 8}
    assert "no_such_module_here" in rows(tmp_path)["test_b.py (not collected)"]["message"]


def test_all_good_and_skipped_is_good(tmp_path: Path) -> None:
    write(tmp_path, "def test_none(): pytest.skip('needs two GPUs')")
    status, out = run(tmp_path, "--processes", "2", plugins=True)
    assert status == 0, out
    assert outcomes(tmp_path) == {"passed": ["good"] * 8, "skipped": ["test_none"]}
    assert "needs two GPUs" in rows(tmp_path)["test_none"]["message"]
    assert "8 passed, 0 failed, 0 lost, 0 hang, 1 skipped, 0 not run in" in out.splitlines()[-1]


@pytest.mark.slow
def test_tests_begin_in_the_order_given_and_earlier_failures_first(tmp_path: Path) -> None:
    write(tmp_path, "def test_bad(): assert os.environ.get('REPAIRED')", n=2)
    write(tmp_path, "", "test_b.py", n=2)
    named = ("test_b.py::test_good_after", "test_a.py")
    assert run(tmp_path, "--processes", "1", paths=named)[0] == 1
    order = [line["test"] for line in rows_in_order(tmp_path)]
    assert [test[:7] for test in order] == ["test_b."] * 2 + ["test_a."] * 5
    earlier = tmp_path / "earlier.csv"
    (tmp_path / "out" / "c.csv").rename(earlier)
    assert run(tmp_path, "--processes", "1", "--first", str(earlier), paths=named)[0] == 1
    assert rows_in_order(tmp_path)[0]["test"] == "test_a.py::test_bad"


def rows_in_order(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "c.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_what_ended_and_no_worker(tmp_path: Path, sent: signal.Signals) -> None:
    """The tests after the first few wait for what never comes; each worker's pipe is closed when it is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    waits = (
        f"pipe = open({str(pipe)!r}, 'w')\n\ndef test_waits():\n    print('here', file=pipe, flush=True)\n    time.sleep(3600)"
    )
    write(tmp_path, waits)
    process = start(tmp_path, "--processes", "1", "--timeout", "3600")
    os.set_blocking(reading, True)
    assert os.read(reading, 5) in (b"here\n", b"")
    results = tmp_path / "out" / "c.csv"
    while not results.exists() or results.read_bytes().count(b"\n") < 5:  # the header and four tests; it is being written
        assert process.poll() is None
    process.send_signal(sent)
    out = process.communicate()[0]
    assert outcomes(tmp_path) == {"passed": ["good"] * 4}
    assert process.returncode == (1 if sent is signal.SIGTERM else -signal.SIGKILL)
    if sent is signal.SIGTERM:
        assert "4 passed, 0 failed, 0 lost, 0 hang, 0 skipped, 5 not run in" in out.splitlines()[-1]
    while os.read(reading, 5):  # ends when the last worker that could write is gone
        pass
    os.close(reading)


def test_at_the_deadline_no_test_is_begun(tmp_path: Path) -> None:
    write(tmp_path, "def test_waits():\n    time.sleep(3600)")
    status, out = run(tmp_path, "--processes", "1", "--seconds", "0")
    assert status == 1, out
    assert rows(tmp_path) == {}
    assert "no worker could collect" in out.splitlines()[-1]


def test_a_worker_that_collects_other_tests_gets_none(tmp_path: Path) -> None:
    run = correctness.Run(correctness.arguments([str(tmp_path / "c.csv"), "tests"]), tmp_path)
    given: list[list[int | None]] = [[], []]
    workers = [SimpleNamespace(number=i, ready=False, give=given[i].append) for i in range(2)]
    run.collected(workers[0], [("a", 1, 0.0), ("b", 1, 50.0)], 0, [])  # type: ignore[arg-type]
    run.collected(workers[1], [("b", 1, 0.0), ("a", 1, 50.0)], 0, [])  # type: ignore[arg-type]
    assert given == [[], [None]]
    assert run.pending == [0, 1]
    assert [run.limit(index) for index in run.pending] == [30.0, 50.0]  # --timeout, or the test's own
    run.results["a"] = correctness.Result("a", "passed", 0.0, 0)
    assert run.status() == 1
    assert run.summary().endswith("1 workers collected other tests")


def test_large_tests_run_one_after_the_other(tmp_path: Path) -> None:
    """Each holds more than half of the memory that the workers say the device has: no two at once."""
    memory = "\ncorrectness_plugin.device_memory = lambda: 64 << 30\n"
    (tmp_path / "conftest.py").write_text(CONFTEST + memory)
    alone_in_folder = f"""
@pytest.mark.memory(40 << 30)
@pytest.mark.parametrize("i", range(4))
def test_large(i):
    busy = os.path.join({str(tmp_path)!r}, "busy")
    os.mkdir(busy)
    time.sleep(0.3)
    os.rmdir(busy)
"""
    write(tmp_path, alone_in_folder)
    status, out = run(tmp_path, "--processes", "3")
    assert status == 0, out
    assert len(outcomes(tmp_path)["passed"]) == 12


def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert correctness.main([str(tmp_path / "c.csv"), str(tmp_path)]) == 2
    assert capsys.readouterr().out.splitlines() == ["bench.correctness: no CUDA device: nothing was run"]


def test_a_path_that_is_not_there_ends_at_once(tmp_path: Path) -> None:
    write(tmp_path, "")
    status, out = run(tmp_path, "--processes", "2", paths=("test_a.py", "no_such_file.py"))
    assert status == 1
    assert "no_such_file.py" in out
    assert "no worker could collect the tests" in out.splitlines()[-1]


def test_kernels_are_found_in_messages() -> None:
    assert correctness.kernel_of("at vectorized_elementwise_kernel, then linear_fwd_tma_kernel<128>") == "linear_fwd_tma_kernel"
    assert correctness.kernel_of("some_other_kernel failed") == "some_other_kernel"
    assert correctness.kernel_of("no name") == ""
    assert set(sanitize.kernels()) == correctness.our_kernels()


def test_a_long_message_keeps_both_ends() -> None:
    message = short("first line\nsecond " + "x" * 2000 + " the end")
    assert len(message) <= MESSAGE
    assert message.startswith("first line second xxx")
    assert message.endswith("xxx the end")


SANITIZER = """#!/bin/sh
case "$*" in *kernel_substring=*) test "$REFUSES" && { echo "unknown option"; exit 1; };; esac
while [ "$1" != -m ]; do shift; done
printf 'call 1: softmax long_row bfloat16\ncall 2: linear descriptors bfloat16\n%b' "$SAYS"
exit "${CODE:-0}"
"""
SUMMARY = "2 calls done\n========= ERROR SUMMARY: {} errors\n"
INVALID = "========= Invalid __global__ read of size 4 bytes\n=========     at softmax_fwd_kernel+0x9a0 in softmax.py:70\n"


@pytest.mark.parametrize(
    ("environment", "status", "last"),
    [
        ({"SAYS": SUMMARY.format(0)}, 0, "memcheck: 2 calls, 0 errors"),
        ({"SAYS": SUMMARY.format(0), "REFUSES": "1"}, 0, "memcheck: 2 calls, 0 errors"),
        ({"SAYS": INVALID + SUMMARY.format(3), "CODE": "86"}, 1, "memcheck: 2 calls, 3 errors in softmax_fwd_kernel, exit status 86"),
        ({"SAYS": INVALID, "CODE": "86"}, 1, "memcheck: 2 calls, 1 error in softmax_fwd_kernel, ended in call 2: linear descriptors bfloat16, exit status 86"),
    ],
    ids=["clean", "options_refused", "errors", "broken_off"],
)  # fmt: skip
def test_the_sanitizer_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    environment: dict[str, str], status: int, last: str,
) -> None:  # fmt: skip
    """With a program in compute-sanitizer's place that prints what it would."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert sanitize.watch("memcheck", str(program)) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().out.splitlines()[-1] == last


def test_the_sanitizer_is_told_our_kernels_and_no_others() -> None:
    words = next(sanitize.attempts("compute-sanitizer", "racecheck"))
    named = [word.removeprefix("kernel_substring=") for word in words if word.startswith("kernel_substring=")]
    assert named == sanitize.kernels()
    assert len(named) > 20
    assert "--report-api-errors" not in words  # memcheck's alone
    assert sanitize.command("memcheck")[-2:] == ["bench.sanitize", "memcheck"]
    assert sanitize.UNCACHED == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
