"""The table of what fuse covers: its rows, its bounds, the models it is made of, and what it asks of its environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import fuse
from tests.fuse import coverage, zoo
from tests.fuse.coverage import KINDS, ROOT, Row, difference, main, markdown, measured, mismatches, pins


def _none(**counts: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {kind: counts.get(kind, (0, 0)) for kind in KINDS}


def test_a_row_is_counted_before_and_after() -> None:
    row = measured("BertModel", None)
    assert row.before == _none(layer_norm=(0, 5), linear=(0, 3), add_norm=(0, 4))
    assert row.after == _none(layer_norm=(5, 5), linear=(3, 3), add_norm=(0, 4))
    assert row.equal
    assert row.dtype == "float64"
    assert list(row.notes) == []


@pytest.mark.slow
def test_eager_attention_shows_its_softmax() -> None:
    model, inputs = zoo.make("BertModel", "eager")
    assert coverage.count(model, (), inputs)["softmax"] == (0, 2)


class Odd(nn.Module):
    """A model that runs in fp32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.float())


def _odd(name: str, attention: str | None) -> zoo.Made:
    return Odd().eval(), {"x": torch.randn(2, 4)}


def _no(*_: Any) -> Any:
    raise ValueError("not\nhere")


def _broken(model: nn.Module) -> Any:
    """A fuse that changes what is computed."""
    report = fuse(model)
    model.fc.bias.data.add_(1)
    return report


@pytest.mark.filterwarnings("ignore:fuse. nothing was fused")
@pytest.mark.parametrize(
    ("replaced", "notes"),
    [
        ({"make": _odd}, ["compared in float32: the model does not run in fp64"]),
        ({"make": _no}, ["could not be made: ValueError: not here"]),
        ({"make": _odd, "fuse": _no}, ["could not be fused: ValueError: not here"]),
        (
            {"make": _odd, "fuse": _broken},
            ["compared in float32: the model does not run in fp64", "NOT EQUAL"],
        ),
    ],
    ids=["fp32", "not made", "not fused", "not equal"],
)
def test_what_goes_wrong_with_a_model_is_in_its_row(
    replaced: dict[str, Callable[..., Any]], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, function in replaced.items():
        monkeypatch.setattr(coverage, name, function)
    row = measured("any", None)
    assert [note.split(":")[0] if "EQUAL" in note else note for note in row.notes] == notes
    assert row.equal == ("NOT EQUAL" not in notes)
    written = markdown([row], {"torch": "1"}, None)
    assert all(note in written for note in notes)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 2.5]], [[1.0, 2.0]], 0.25),
        ([[1.0], [5.0]], [[1.0], [4.0]], 0.25),
        ([[NAN, 2.0]], [[NAN, 2.0]], 0.0),
        ([[-INF, 2.0]], [[-INF, 2.0]], 0.0),
        ([[1.0, NAN]], [[1.0, 2.0]], INF),
        ([[1.0, 2.0]], [[1.0, NAN]], INF),
        ([[INF, 2.0]], [[-INF, 2.0]], INF),
        ([[NAN]], [[NAN]], INF),
        ([[1.0, 2.0]], [[1.0]], INF),
        ([[1.0]], [[1.0], [1.0]], INF),
        ([], [], INF),
    ],
)
def test_difference_is_the_largest_and_never_hides_a_nan(found: Any, expected: Any, value: float) -> None:
    assert difference([torch.tensor(t) for t in found], [torch.tensor(t) for t in expected]) == value


def test_the_table_has_sums_and_says_whether_the_report_agrees() -> None:
    rows = [
        Row("BertModel", _none(linear=(0, 3)), _none(linear=(2, 3)), 0.0, agrees=True),
        Row("LlamaModel", _none(linear=(0, 2)), _none(linear=(2, 2), rms_norm=(0, 1)), 1e-9, agrees=False),
        Row("T5Model", failure="could not be fused: ValueError"),
    ]
    lines = markdown(rows, {"torch": "1.2"}, "eager").splitlines()
    cells = {line.split(" | ")[0]: [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:2] == "| "}
    assert "--attention eager" in lines[2]
    assert "torch 1.2" in lines[2]
    header = cells["| model"]
    at = [header.index(column) for column in ("linear", "rms norm", "difference", "report agrees", "notes")]
    assert [cells["| BertModel"][i] for i in at] == ["2/3", "", "0", "yes", ""]
    assert [cells["| LlamaModel"][i] for i in at] == ["2/2", "0/1", "1e-09", "NO", "rms_norm was 0/0 before fuse"]
    assert [cells["| T5Model"][i] for i in at] == ["-", "-", "-", "-", "could not be fused: ValueError"]
    assert [cells["| **1 models**"][i] for i in at] == ["2/2", "0/1", "1e-09", "0 of 1", ""]


def test_the_zoo_has_the_most_used_and_a_hundred_more() -> None:
    assert len(set(zoo.NAMES)) == len(zoo.NAMES) > 200
    assert set(zoo.FIRST) <= set(zoo.NAMES)
    assert len(zoo.FIRST) >= 30
    assert {name for name in zoo.NAMES if name.startswith("timm/")} == {f"timm/{name}" for name in zoo.TIMM}


def test_the_versions_are_those_of_the_files_that_pin_them() -> None:
    wanted = pins()
    assert list(wanted) == ["torch", "transformers", "timm"]
    assert wanted["torch"] in (coverage.ROOT / "constraints.txt").read_text()
    assert list(mismatches({"torch": torch.__version__.split("+")[0]})) == []
    assert list(mismatches({"torch": "0.1", "no-such-package": "2.3"})) == [
        f"torch==0.1 is needed, and is {torch.__version__.split('+')[0]}",
        "no-such-package==2.3 is needed, and is missing",
    ]


def test_the_command_refuses_another_environment_and_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "pins", lambda: {"torch": "0.1", "timm": "0.2"})
    with pytest.raises(SystemExit) as stopped:
        main(["--models", "BertModel"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "torch==0.1 is needed" in said
    assert "timm" not in said.split("\n\n")[0]  # no model of timm is asked for
    assert "-m pip install --no-deps -r tests/fuse/requirements.txt" in said


def test_the_command_refuses_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--models", "BertModel", "Nothing*"])
    assert "no model is named Nothing*; there are BertModel" in capsys.readouterr().err


def test_the_command_writes_the_table_and_fails_where_a_row_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "pins", lambda: {"timm": "0.2"})
    output = tmp_path / "table.md"
    assert main(["--models", "T5Model", "Bert[M]odel", "--output", str(output)]) == 0
    assert "| T5Model |  | 0/12 |  | 4/4 |  | 0/10 |" in output.read_text()
    assert output.read_text().index("| BertModel |") < output.read_text().index("| T5Model |")
    monkeypatch.setattr(coverage, "make", _no)
    assert main(["--models", "BertModel", "--output", str(output)]) == 1
    assert "could not be made: ValueError: not here" in output.read_text()


def test_the_readmes_figures_are_the_tables() -> None:
    """docs/fuse-coverage.md has the sums of its two tables; README has theirs, and how many models they are of."""
    rows = [
        line.split("|")[1:] for line in (ROOT / "docs/fuse-coverage.md").read_text().splitlines() if line.startswith("| **")
    ]
    assert len(rows) == 2
    models = sum(int(row[0].strip(" *").split()[0]) for row in rows)
    sums = [[sum(int(row[column].split("/")[part]) for row in rows) for part in (0, 1)] for column in range(1, 6)]
    readme = (ROOT / "README.md").read_text()
    assert f"Over {models} architectures" in readme
    assert "| " + " | ".join(f"{done} of {every}" for done, every in sums) + " |" in readme
