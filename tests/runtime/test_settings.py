"""The environment's variables: what each takes, what it refuses and how, and that nothing else reads one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fused_ops import REGISTRY
from fused_ops._runtime import settings
from fused_ops.export.cli import app
from tests import process
from tests.packaging.conftest import ROOT
from tests.packaging.sources import files

CALLED = {"FUSED_OPS_CACHE", "FUSED_OPS_COMMIT"}  # read at each call: any text
NAMES = [name for name in settings.KNOWN if name not in CALLED]
SWITCHES = {
    "TRITON_INTERPRET": "INTERPRET",
    "FUSED_OPS_NVTX": "NVTX",
    "FUSED_OPS_INLINE": "INLINE",
    "FUSED_OPS_CLUSTER": "CLUSTER",
    "FUSED_OPS_GLUON": "GLUON",
}
CHOICES = {"FUSED_OPS_BACKEND": ("auto", "triton", "aten"), "FUSED_OPS_LAUNCH": ("auto", "triton")}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """The names of the module settings as an import would make them with these variables."""
    source = Path(settings.__file__).read_text()

    def run(**environment: str) -> dict[str, Any]:
        for name in settings.KNOWN:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(sys.modules, "made", type(sys)("made"))
        made: dict[str, Any] = {"__name__": "made"}
        exec(compile(source, settings.__file__, "exec"), made)
        return made

    yield run
    monkeypatch.undo()


@pytest.mark.parametrize("variable", SWITCHES)
def test_a_switch_takes_the_same_words_in_any_case(variable: str, read: Callable[..., dict[str, Any]]) -> None:
    name, default = SWITCHES[variable], read()[SWITCHES[variable]]
    assert read(**{variable: ""})[name] is default
    for words, value in ((settings.TRUE_WORDS, True), (settings.FALSE_WORDS, False)):
        for word in words:
            for said in (word, word.upper(), word.title()):
                assert read(**{variable: said})[name] is value, said


def test_triton_means_the_same_by_each_word(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    for words, value in ((settings.TRUE_WORDS, True), (settings.FALSE_WORDS, False)):
        for word in (*words, *map(str.upper, words)):
            monkeypatch.setenv("TRITON_INTERPRET", word)
            assert knobs.runtime.interpret is value, word


@pytest.mark.parametrize("variable", CHOICES)
def test_a_choice_takes_its_words_in_any_case(variable: str, read: Callable[..., dict[str, Any]]) -> None:
    name = variable.removeprefix("FUSED_OPS_")
    assert read()[name] == read(**{variable: ""})[name] == "auto"
    assert [read(**{variable: word.upper()})[name] for word in CHOICES[variable]] == list(CHOICES[variable])


BAD = ("maybe", "2", " 1", "1 ", "tru", "-1", "nan", "auto,aten", "\udcff", "x" * 5000)


@pytest.mark.parametrize("variable", [name for name in NAMES if name != "FUSED_OPS_COMPILE_WITH_ATEN"])
@pytest.mark.parametrize("value", BAD, ids=range(len(BAD)))
def test_everything_else_is_refused_by_name(variable: str, value: str, read: Callable[..., dict[str, Any]]) -> None:
    if variable == "FUSED_OPS_BENCH_PREPARE_S" and value in ("2", " 1", "1 "):
        assert read(**{variable: value})["BENCH_PREPARE_S"] == float(value)
        return
    with pytest.raises(ValueError, match=rf"^{variable}: got ") as caught:
        read(**{variable: value})
    said = str(caught.value)
    assert said.startswith(f"{variable}: got {value[:100]!r}, allowed: ")
    assert len(said) < 400
    said.encode()


def test_all_refusals_are_said_at_once(read: Callable[..., dict[str, Any]]) -> None:
    values = dict.fromkeys((*SWITCHES, *CHOICES, "FUSED_OPS_BENCH_PREPARE_S"), "maybe")
    with pytest.raises(ValueError, match="got 'maybe'") as caught:
        read(**values)
    assert re.findall(r"(\w+): got", str(caught.value)) == [name for name in settings.KNOWN if name in values]


@pytest.mark.parametrize(
    ("value", "wrong"),
    [("nonsense", "nonsense"), ("softmax,nonsense", "nonsense"), ("all,softmaxx", "softmaxx"), ("softmax_fwd", "softmax_fwd"), ("1", "1")],
)  # fmt: skip
def test_only_ops_are_compiled_with_aten(value: str, wrong: str, read: Callable[..., dict[str, Any]]) -> None:
    made = read(FUSED_OPS_COMPILE_WITH_ATEN=value)
    with pytest.raises(ValueError, match=rf"^FUSED_OPS_COMPILE_WITH_ATEN: got '{wrong}', allowed: 'all', ") as caught:
        made["check_ops"](REGISTRY)
    assert all(repr(name) in str(caught.value) for name in REGISTRY)


@pytest.mark.parametrize("value", ["", "all", "ALL", ",".join(REGISTRY), " Softmax , layer_norm,"])
def test_every_op_may_be_compiled_with_aten(value: str, read: Callable[..., dict[str, Any]]) -> None:
    read(FUSED_OPS_COMPILE_WITH_ATEN=value)["check_ops"](REGISTRY)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("FUSED_OPS_BACKNED", "did you mean FUSED_OPS_BACKEND?"),
        ("FUSEDOPS_CLUSTER", "did you mean FUSED_OPS_CLUSTER?"),
        ("FUSED_OP_NVTX", "did you mean FUSED_OPS_NVTX?"),
        ("fused_ops_inline", "did you mean FUSED_OPS_INLINE?"),
        ("FUSED_OPS_OF_LATER", "there are FUSED_OPS_CACHE, "),
    ],
)
def test_a_name_that_is_not_known_is_warned_of(name: str, hint: str, read: Callable[..., dict[str, Any]]) -> None:
    with pytest.warns(UserWarning, match=re.escape(f"this version reads no variable {name}; {hint}")):
        assert read(**{name: "1"})["REFUSED"] == []


def test_a_known_name_is_not_warned_of(read: Callable[..., dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(**dict.fromkeys(settings.KNOWN, ""), FUSED_OPS_TEST_PYTHON="python", FUSED="1", OPS_FUSED_OPS="1")


def test_a_user_without_a_home_has_settings(read: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert not read()["user_folder"]().exists()


def test_every_variable_of_ours_that_the_code_names_is_known() -> None:
    paths = [path for part in ("fused_ops", "kernels", "export", "bench") for path in files(part)]
    named = {name for path in paths for name in re.findall(r"\bFUSED_OPS_[A-Z_]*[A-Z]", (ROOT / path).read_text())}
    assert named - {"FUSED_OPS_TEST"} == set(settings.KNOWN) - {"TRITON_INTERPRET"}


def test_the_import_is_refused_in_one_sentence(tmp_path: Path) -> None:
    name, value = "FUSED_OPS_COMPILE_WITH_ATEN", "nonsense"
    done = process.run("import fused_ops", env=os.environ | {name: value}, cwd=tmp_path)
    assert done.returncode == 1
    said = f"fused_ops._runtime.settings.SettingError: {name}: got {value!r}, allowed: "
    assert done.stderr.splitlines()[-1].startswith(said)
    assert done.stderr.count("Traceback") == 1


def test_after_a_refusal_the_import_can_be_made_again() -> None:
    code = """
import os
try:
    import fused_ops
except ValueError:
    os.environ["FUSED_OPS_BACKEND"] = "aten"
import fused_ops
from fused_ops._runtime import settings
print(settings.BACKEND)
"""
    assert process.output(code, env=os.environ | {"FUSED_OPS_BACKEND": "atn"}) == "aten\n"


REFUSED = settings.Refusal("FUSED_OPS_BACKEND", "foo", "'auto', 'triton', 'aten'")
COMMANDS = [
    ["inspect", "x.onnx"], ["tune"], ["audit", "--json"], ["export", "onnx", "-o", "x.onnx"], ["verify", "x.onnx"],
    ["quantize", "x.onnx", "-o", "y.onnx"], ["forecast", "softmax", "1", "1"],
]  # fmt: skip


def test_no_command_but_doctor_runs_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REFUSED", [REFUSED])
    named = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named |= {group.name for group in app.registered_groups if group.name}
    assert named == {command[0] for command in COMMANDS} | {"doctor"}
    for command in COMMANDS:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert done.output == f"fused-ops {command[0]}: {REFUSED}\n"
        assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("argv", "started", "is_command"),
    [
        (["-m", "doctor"], ["python", "-m", "fused_ops", "doctor"], True),
        (["-m"], ["python", "-X", "dev", "-m", "fused_ops"], True),
        (["-m", "a", "b"], ["python", "-Imfused_ops", "a", "b"], True),
        (["-m", "fused_ops"], ["python", "-m", "bench", "fused_ops"], False),
        (["/usr/bin/fused-ops", "doctor"], ["python", "/usr/bin/fused-ops", "doctor"], True),
        (["fused-ops.exe"], ["fused-ops.exe"], True),
        (["fused_ops.py"], ["python", "fused_ops.py"], False),
        (["-c"], ["python", "-c", "import fused_ops"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_the_command_is_known_by_how_it_was_started(
    argv: list[str], started: list[str], is_command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", started)
    assert settings._is_command() is is_command


def test_the_command_line_answers_although_the_import_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "FUSED_OPS_CLUSTER": "maybe",
        "FUSED_OPS_COMPILE_WITH_ATEN": "nonsense",
    }
    command = [sys.executable, "-m", "fused_ops", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    refused = json.loads(done.stdout)["refused"]
    assert [(each["variable"], each["got"]) for each in refused] == [
        ("FUSED_OPS_CLUSTER", "maybe"), ("FUSED_OPS_COMPILE_WITH_ATEN", "nonsense"),
    ]  # fmt: skip
    assert "'softmax'" in refused[1]["allowed"]
