"""The command line as a user types it: what it writes, what it prints, its exit status, its one-line errors."""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fused_ops.export import ExportError
from fused_ops.export.cli import app
from fused_ops.export.cli.exports import _pools, _profiles
from fused_ops.export.cli.sources import _from_factory, parse_input, parse_sizes
from fused_ops.export.files.pt2 import load_program
from tests.export.onnx_files import linear_model, save
from tests.export.test_safety import Trap

FACTORY = """
import torch

def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))

number = 7
"""
MLP = ["--model", "cli_models:mlp", "--input", "input=float32[batch:2,32]"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A working directory with an importable factory; the width is fixed so that nothing folds."""
    (tmp_path / "cli_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("cli_models", None)


def run(*args: str, status: int = 0) -> str:
    """stdout of a command that ends with this status; what went wrong is shown otherwise."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


def program() -> None:
    model = torch.nn.Linear(4, 2)
    exported = torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, "program.pt2")


def test_onnx_is_written_and_verified_fused_or_not() -> None:
    for extra in ([], ["--fuse"]):
        details = json.loads(run("export", "onnx", *MLP, *extra, "-o", "mlp.onnx", "--json"))
        assert details["inputs"] == ["input(batch, 32) FLOAT"]
        assert details["operators"]["LayerNormalization"] == 1
        report = json.loads(run("verify", "mlp.onnx", *MLP, "--size", "batch=1", "--size", "batch=9", "--json"))
        assert report["ok"]
        assert [row["inputs"] for row in report["rows"]] == ["[1, 32]", "[9, 32]"]


def test_verify_fails_with_status_1() -> None:
    run("export", "onnx", *MLP, "-o", "mlp.onnx")
    Path("cli_models.py").write_text(FACTORY.replace("manual_seed(0)", "manual_seed(1)"))
    sys.modules.pop("cli_models")
    assert "FAILED" in run("verify", "mlp.onnx", *MLP, status=1)


def test_precision_is_a_graph_transform() -> None:
    details = json.loads(run("export", "onnx", *MLP, "-o", "half.onnx", "--precision", "fp16", "--json"))
    assert details["operators"]["Cast"] > 0
    assert json.loads(run("inspect", "half.onnx", "--json"))["weights"]["FLOAT16"] > 32 * 64


def test_a_part_of_a_model() -> None:
    details = json.loads(run("export", "onnx", *MLP, "--submodule", "1", "-o", "part.onnx", "--json"))
    assert details["operators"] == {"Gemm": 1}


def test_an_exported_program_is_a_source() -> None:
    program()
    details = json.loads(run("export", "onnx", "--program", "program.pt2", "-o", "p.onnx", "--json"))
    assert details["operators"] == {"Gemm": 1}
    assert "not possible with --program" in run(
        "export", "onnx", "--program", "program.pt2", "--fuse", "-o", "p.onnx", status=2
    )


@pytest.mark.parametrize("trap", ["weights", "constants", "compiled"])
def test_an_exported_program_is_never_unpickled(tmp_path: Path, trap: str) -> None:
    program()
    with zipfile.ZipFile("program.pt2") as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    evil = pickle.dumps(Trap(str(tmp_path / "ran")))
    if trap == "weights":
        config = json.loads(members["data/weights/model_weights_config.json"])
        for entry in config["config"].values():
            entry["use_pickle"] = True
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()
        torch.save(Trap(str(tmp_path / "ran")), "weight.pt")
        members |= dict.fromkeys(("data/weights/weight_0", "data/weights/weight_1"), Path("weight.pt").read_bytes())
    elif trap == "constants":
        members["data/constants/opaque_obj_0"] = evil
    else:
        members["data/aotinductor/model/x.so"] = b"\x7fELF"
    with zipfile.ZipFile("trap.pt2", "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(f"trap/{name}", data)
    with pytest.raises(ExportError, match=r"no ExportedProgram of tensors|no pickled or compiled objects"):
        load_program("trap.pt2")
    assert not (tmp_path / "ran").exists()
    assert "export onnx: --program" in run("export", "onnx", "--program", "trap.pt2", "-o", "p.onnx", status=2)
    assert not (tmp_path / "ran").exists()
    if trap == "weights":  # the trap works: torch's own loader falls into it
        with contextlib.suppress(Exception):
            torch.export.load("trap.pt2")
        assert (tmp_path / "ran").exists()


def test_torchscript_and_inspect() -> None:
    run("export", "torchscript", *MLP, "-o", "mlp.pt")
    assert json.loads(run("inspect", "mlp.pt", "--json"))["kind"] == "torchscript"
    run("verify", "mlp.pt", *MLP)


def test_an_aotinductor_package_is_called_as_it_was_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the package, which like it insists on keywords: test_aoti compiles a real one."""

    def package(**inputs: torch.Tensor) -> torch.Tensor:
        return _from_factory("cli_models:mlp").eval()(inputs["input"])

    Path("mlp.pt2").write_bytes(b"package")
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: package)
    report = json.loads(run("verify", "mlp.pt2", *MLP, "--size", "batch=5", "--json"))
    assert [(row["inputs"], row["ok"]) for row in report["rows"]] == [("[5, 32]", True)]


def test_an_engine_with_trtexecs_flags() -> None:
    pytest.importorskip("tensorrt_rtx")
    save(linear_model(), Path("m.onnx"))
    shapes = ["--minShapes", "x:1x1x16", "--optShapes", "x:4x8x16", "--maxShapes", "x:8x32x16"]
    longer = ["--minShapes", "x:1x33x16", "--optShapes", "x:1x64x16", "--maxShapes", "x:2x512x16"]
    details = json.loads(
        run("export", "engine", "--onnx", "m.onnx", "--saveEngine", "m.engine", *shapes, *longer, "--backend", "tensorrt_rtx",
            "--memPoolSize", "workspace:256", "--computeCapabilities", "8.9,12.0", "--json")
    )  # fmt: skip
    assert len(details["profiles"]) == 2
    manifest = json.loads(Path("m.engine.manifest.json").read_text())
    assert manifest["options"]["memory_pools"] == {"workspace": 256 * 2**20}
    assert manifest["options"]["compute_capability"] == ["8.9", "12.0"]
    assert "x: 1x1x16 4x8x16 8x32x16" in run("inspect", "m.engine")
    Path("m.engine").write_bytes(b"changed")
    assert "differs" in run("inspect", "m.engine", status=1)


def test_a_repository() -> None:
    pytest.importorskip("tritonclient")
    save(linear_model(), Path("m.onnx"))
    shown = run("export", "repository", "m.onnx", "--root", "models", "--name", "m", "--max-batch-size", "8", "--gpus", "0,1")
    assert 'backend: "onnxruntime"' in shown
    assert Path("models/m/1/model.onnx").is_file()
    run("export", "torchscript", *MLP, "-o", "mlp.pt")
    ports = ["--input", "INPUT__0=FLOAT[-1,32]", "--output", "OUTPUT__0=FLOAT[-1,8]"]
    run("export", "repository", "mlp.pt", "--root", "models", "--name", "mlp", *ports)
    assert Path("models/mlp/1/model.pt").is_file()


def test_quantisation_measures_on_held_out_batches() -> None:
    run("export", "onnx", *MLP, "-o", "mlp.onnx")
    rng = np.random.default_rng(0)
    for index in range(8):
        np.savez(f"batch{index}.npz", input=rng.standard_normal((4, 32), dtype=np.float32))
    data = [text for index in range(8) for text in ("--calibration", f"batch{index}.npz")]
    report = json.loads(run("quantize", "mlp.onnx", "-o", "int8.onnx", *data, "--json"))
    assert len(report["quantized"]) == 2
    assert 0.99 < report["cosine_min"] <= report["cosine_mean"] <= 1
    operators = json.loads(run("inspect", "int8.onnx", "--json"))["operators"]
    assert operators["QuantizeLinear"] >= 2
    rows = json.loads(run("quantize", "mlp.onnx", "-o", "none.onnx", *data, "--sensitivity", "--json"))["rows"]
    assert len(rows) == 2
    assert not Path("none.onnx").exists()
    assert "over 2 held-out batches" in run("quantize", "mlp.onnx", "-o", "int8.onnx", *data)


def test_calibration_data_is_never_unpickled(tmp_path: Path) -> None:
    save(linear_model(), Path("m.onnx"))
    np.savez("trap.npz", x=np.array([Trap(str(tmp_path / "ran"))], dtype=object))
    assert "trap.npz' is no .npz file of numeric arrays" in run(
        "quantize", "m.onnx", "-o", "q.onnx", "--calibration", "trap.npz", status=2
    )
    assert not (tmp_path / "ran").exists()


ERRORS: dict[str, tuple[list[str], str]] = {
    "no source": (["export", "onnx", "-o", "m.onnx"], "got none or several of --model, --hf, --program"),
    "two sources": (["export", "onnx", "-o", "m.onnx", *MLP, "--hf", "x"], "got none or several"),
    "no module": (["export", "onnx", "-o", "m.onnx", "--model", "missing:mlp", "--input", "x=float32[2]"], "No module named 'missing'"),
    "no factory": (["export", "onnx", "-o", "m.onnx", "--model", "cli_models:x", "--input", "x=float32[2]"], "no attribute 'x'"),
    "no colon": (["export", "onnx", "-o", "m.onnx", "--model", "cli_models", "--input", "x=float32[2]"], "package.module:factory"),
    "a number": (["export", "onnx", "-o", "m.onnx", "--model", "cli_models:number", "--input", "x=float32[2]"], "gave int, allowed"),
    "no input": (["export", "onnx", "-o", "m.onnx", "--model", "cli_models:mlp"], "--input: got none"),
    "input name": (
        ["export", "onnx", "-o", "m.onnx", "--model", "cli_models:mlp", "--input", "x=float32[2,32]"],
        "--input: got 'x', allowed: the arguments of the model's forward: input",
    ),
    "input text": (["export", "onnx", "-o", "m.onnx", "--model", "cli_models:mlp", "--input", "input:2x32"], "--input: got 'input:2x32'"),
    "hf": (["export", "onnx", "-o", "m.onnx", "--hf", "missing"], "--hf: got 'missing', allowed: a folder with config.json"),
    "opset": (["export", "onnx", "-o", "m.onnx", *MLP, "--opset", "3"], "opset: got 3, allowed: 18 to 25"),
    "output": (["export", "onnx", "-o", "no/m.onnx", *MLP], "a folder that exists"),
    "missing onnx": (["export", "engine", "--onnx", "no.onnx", "--saveEngine", "m.engine"], "got 'no.onnx', allowed: a readable file"),
    "half a profile": (
        ["export", "engine", "--onnx", "no.onnx", "--saveEngine", "m.engine", "--minShapes", "x:1"],
        "got 1, 0, 0 of them, allowed: the same number of each",
    ),
    "size": (["verify", "m.onnx", *MLP, "--size", "rows=3"], "--size: got 'rows', allowed: batch"),
    "inspect": (["inspect", "cli_models.py"], "cli_models.py"),
    "calibration": (["quantize", "m.onnx", "-o", "q.onnx"], "--calibration, --text: got both or none"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_status_2(case: str, tmp_path: Path) -> None:
    args, message = ERRORS[case]
    before = sorted(tmp_path.iterdir())
    output = run(*args, status=2)
    assert message in output
    assert output.startswith(f"fused-ops {' '.join(args[: 2 if args[0] == 'export' else 1])}: ")
    assert output.count("\n") == 1
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_layer_report_needs_a_gpu() -> None:
    save(linear_model(4, 8), Path("m.onnx"))
    args = ["export", "engine", "--onnx", "m.onnx", "--saveEngine", "m.engine", "--exportLayerInfo", "layers.json"]
    assert "--exportLayerInfo: not possible here" in run(*args, status=2)
    assert not Path("m.engine").exists()


def test_every_command_has_json_and_an_example() -> None:
    import typer

    def walk(command: Any, name: str) -> list[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        return (
            [(name, command)] if not inner else [found for key, each in inner.items() for found in walk(each, f"{name} {key}")]
        )

    ours = [entry for entry in walk(typer.main.get_command(app), "fused-ops")
            if entry[0].split()[1] in ("export", "verify", "quantize", "inspect")]  # fmt: skip
    assert len(ours) == 8
    for name, command in ours:
        assert f"Example: {name} " in command.help, name
        assert any("--json" in parameter.opts for parameter in command.params), name


def test_texts_are_parsed() -> None:
    spec = parse_input("ids=int64[batch:2, 16]<100")
    assert (spec.name, spec.dtype, spec.dims, spec.below) == ("ids", torch.int64, (("batch", 2), ("", 16)), 100)
    assert spec.dynamic == {0: "batch"}
    values = spec.example({"batch": 5}, torch.Generator().manual_seed(0))
    assert values.shape == (5, 16)
    assert 2 < values.max() < 100
    mask = parse_input("mask=int64[4,3]").example({}, torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) == {0, 1}
    assert (mask[:, 0] == 1).all()
    assert parse_sizes("batch=3,sequence=40") == {"batch": 3, "sequence": 40}
    assert _profiles(["a:1x2,b::1:3"], ["a:1x2,b::1:3"], ["a:1x2,b::1:3"]) == [{"a": ((1, 2),) * 3, "b::1": ((3,),) * 3}]
    assert _pools(["workspace:1", "tactic_dram:2G,workspace:3K"]) == {"workspace": 3 * 2**10, "tactic_dram": 2 * 2**30}
    for text in ("workspace", "workspace:", "workspace:x", "workspace:-1"):
        with pytest.raises(ExportError, match="--memPoolSize: got"):
            _pools([text])
