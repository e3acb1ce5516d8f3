"""build_engine: TensorRT-RTX for real (it builds without a GPU), tensorrt 10 and 11 by a fake that records calls."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper

from fused_ops.export import ExportError, build_engine
from fused_ops.export.files.atomic import sha256_of
from fused_ops.export.tensorrt import backend
from fused_ops.export.tensorrt.backend import EngineError
from tests.export.fake_tensorrt import PLAN, fake
from tests.export.onnx_files import PROFILE, linear_model, model, save

pytest.importorskip("tensorrt_rtx")
OLD = b"an engine that was here before"


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return save(linear_model(), tmp_path / "model.onnx")


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.engine").write_bytes(OLD)
    return tmp_path / "out" / "model.engine"


def untouched(engine: Path) -> bool:
    return [file.name for file in engine.parent.iterdir()] == [engine.name] and engine.read_bytes() == OLD


def test_an_engine_and_its_manifest_are_written(onnx_file: Path, engine_file: Path) -> None:
    report = build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE)
    manifest = json.loads((engine_file.parent / "model.engine.manifest.json").read_text())
    assert report.bytes == engine_file.stat().st_size > 10_000
    assert report.sha256 == manifest["sha256"] == sha256_of(engine_file)
    assert manifest["source"] == {"file": "model.onnx", "sha256": sha256_of(onnx_file)}
    assert manifest["kind"] == "tensorrt_rtx"
    assert manifest["opset"] == {"ai.onnx": 20}
    assert manifest["gpu"] is None
    assert manifest["profiles"] == [{"x": [[1, 1, 16], [4, 8, 16], [8, 32, 16]]}]
    assert manifest["inputs"] == [{"name": "x", "dtype": "FLOAT", "dims": ["batch", "sequence", 16]}]
    assert str(engine_file.parent) not in json.dumps(manifest)
    again = build_engine(onnx_file, engine_file, profiles=[PROFILE], backend="tensorrt_rtx")
    assert again.sha256 == report.sha256


def test_several_profiles_and_targets(onnx_file: Path, engine_file: Path) -> None:
    long = {"x": ((1, 32, 16), (1, 64, 16), (2, 512, 16))}
    one = build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=[PROFILE], compute_capability="8.9")
    two = build_engine(
        onnx_file, engine_file, backend="tensorrt_rtx", profiles=[PROFILE, long], compute_capability=("8.0", "12.0")
    )
    assert len(two.manifest["profiles"]) == 2
    assert two.manifest["options"]["compute_capability"] == ["8.0", "12.0"]
    assert two.bytes > one.bytes


@pytest.mark.parametrize(
    "options",
    [{"tf32": True}, {"memory_pools": {"workspace": 1 << 28}}, {"profiling_verbosity": "detailed"}],
    ids=lambda options: next(iter(options)),
)
def test_an_option_reaches_the_builder(onnx_file: Path, engine_file: Path, options: dict[str, Any]) -> None:
    """Each changes the engine's bytes, which are otherwise the same at each build."""
    default = build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE)
    other = build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, **options)
    assert other.sha256 != default.sha256


def test_a_static_model_needs_no_profile(tmp_path: Path, engine_file: Path) -> None:
    assert build_engine(save(linear_model(4, 8), tmp_path / "s.onnx"), engine_file, backend="tensorrt_rtx").bytes > 10_000


BAD_PROFILES: dict[str, tuple[Any, str]] = {
    "none": (None, r"profiles: got none.*x\(batch, sequence, 16\)"),
    "min above opt": ({"x": ((9, 1, 16), (4, 8, 16), (8, 32, 16))}, r"profiles\[0\]\['x'\]: got min \(9, 1, 16\).*min <= opt"),
    "opt above max": ([PROFILE, {"x": ((1, 1, 16), (4, 64, 16), (8, 32, 16))}], r"profiles\[1\].*min <= opt <= max"),
    "unknown name": ({"y": PROFILE["x"]}, r"profiles\[0\]: got y, allowed inputs: x\("),
    "empty": ({}, r"profiles\[0\]: got none|no \(min, opt, max\) for x\("),
    "rank": ({"x": ((1, 1), (4, 8), (8, 32))}, r"min: got \(1, 1\) of rank 2, allowed: rank 3"),
    "static dim": ({"x": ((1, 1, 8), (4, 8, 8), (8, 32, 8))}, r"min: got \(1, 1, 8\), allowed: 16 at dimension 2"),
    "two shapes": ({"x": ((1, 1, 16), (8, 32, 16))}, r"allowed: three shapes"),
    "negative": ({"x": ((-1, 1, 16), (4, 8, 16), (8, 32, 16))}, r"allowed: integers from 0"),
    "float": ({"x": ((1.0, 1, 16), (4, 8, 16), (8, 32, 16))}, r"allowed: integers from 0"),
    "huge": ({"x": ((1, 1, 16), (4, 8, 16), (2**31, 32, 16))}, r"allowed: integers from 0 to 2147483647"),
    "no dict": ([7], r"profiles\[0\]: got int, allowed: a dict"),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_a_bad_profile_is_named(onnx_file: Path, engine_file: Path, case: str) -> None:
    profiles, message = BAD_PROFILES[case]
    with pytest.raises(ExportError, match=message):
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=profiles)
    assert untouched(engine_file)


def test_dimensions_of_one_name_share_one_range(tmp_path: Path, engine_file: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("a", "b", "y")]
    path = save(
        model(helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "g", values[:2], values[2:])), tmp_path / "m"
    )
    with pytest.raises(
        ExportError, match=r"\['b'\]: dimension 'batch': got min, opt, max \(1, 2, 9\), allowed: \(1, 2, 8\) as in 'a'"
    ):
        build_engine(path, engine_file, profiles={"a": ((1, 4), (2, 4), (8, 4)), "b": ((1, 4), (2, 4), (9, 4))})
    assert untouched(engine_file)


def test_a_shape_input_takes_values(tmp_path: Path, engine_file: Path) -> None:
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    graph = helper.make_graph([helper.make_node("Expand", ["x", "shape"], ["y"])], "g", [x, shape], [y])
    path = save(model(graph), tmp_path / "expand.onnx")
    with pytest.raises(ExportError, match=r"'shape', allowed: its values"):
        build_engine(path, engine_file, backend="tensorrt_rtx", profiles={"x": ((1, 4),) * 3})
    assert untouched(engine_file)
    assert build_engine(path, engine_file, backend="tensorrt_rtx", profiles={"shape": ((1, 4), (2, 4), (8, 4))}).bytes > 1000


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "timing cache": ({"timing_cache": "cache"}, "timing_cache: not possible with tensorrt_rtx .*runtime_cache"),
    "level": ({"optimization_level": 3}, "optimization_level: not possible"),
    "hardware": ({"hardware_compatibility": "ampere_plus"}, "hardware_compatibility: not possible.*compute_capability"),
    "version": ({"version_compatible": True}, "version_compatible: not possible.*lean runtime"),
    "capability": ({"compute_capability": "9.0"}, r"compute_capability: got '9.0', allowed: .*'8.9'"),
    "pool": ({"memory_pools": {"heap": 1}}, "memory_pools: got 'heap', allowed: 'workspace'"),
    "pool size": ({"memory_pools": {"workspace": 0}}, r"memory_pools\['workspace'\]: got 0, allowed: bytes"),
    "streams": ({"max_aux_streams": -1}, "max_aux_streams: got -1, allowed: 0"),
    "verbosity": ({"profiling_verbosity": "loud"}, "profiling_verbosity: got 'loud', allowed"),
    "backend": ({"backend": "onnx"}, "backend: got 'onnx', allowed: 'auto', 'tensorrt_rtx', 'tensorrt'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_rtx_cannot_do_is_refused_with_its_reason(
    onnx_file: Path, engine_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    options, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=message):
        build_engine(onnx_file, engine_file, **({"backend": "tensorrt_rtx", "profiles": PROFILE} | options))
    assert untouched(engine_file)


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_refit_without_a_gpu_is_refused(
    onnx_file: Path, engine_file: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(backend, "has_gpu", lambda: False)
    monkeypatch.setattr("fused_ops.export.tensorrt.config.has_gpu", lambda: False)
    with pytest.raises(ExportError, match=f"{option}: not possible with tensorrt_rtx .*needs a GPU at build time"):
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, **{option: True})
    assert untouched(engine_file)


def test_the_builders_log_is_in_the_exception(onnx_file: Path, engine_file: Path) -> None:
    with pytest.raises(EngineError, match="within workspace limit") as caught:
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, memory_pools={"workspace": 1 << 10})
    assert any(line.startswith("error: ") for line in caught.value.messages)
    assert untouched(engine_file)


def test_a_parser_error_names_the_node(tmp_path: Path, engine_file: Path) -> None:
    """Valid ONNX that TensorRT has no layer for."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"], "determinant")], "g", [x], [y])
    with pytest.raises(EngineError, match=r"cannot parse.*\n.*'determinant' \(Det\)"):
        build_engine(save(model(graph), tmp_path / "det.onnx"), engine_file, backend="tensorrt_rtx")
    assert untouched(engine_file)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a"], ids=["empty", "text", "header"])
def test_a_broken_onnx_file_is_refused(tmp_path: Path, engine_file: Path, content: bytes) -> None:
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"build_engine: .*broken\.onnx"):
        build_engine(tmp_path / "broken.onnx", engine_file, backend="tensorrt_rtx")
    assert untouched(engine_file)


def test_an_unwritable_place_is_refused_before_the_build(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a folder that exists"):
        build_engine(onnx_file, tmp_path / "missing" / "model.engine", profiles=PROFILE)


def test_progress_is_told_and_can_cancel(onnx_file: Path, engine_file: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(
        onnx_file, engine_file.with_name("other.engine"), backend="tensorrt_rtx", profiles=PROFILE,
        progress=lambda *event: seen.append(event),
    )  # fmt: skip
    assert len(seen) > 20
    assert all(isinstance(phase, str) and step <= steps for phase, step, steps in seen)
    for file in engine_file.parent.glob("other*"):
        file.unlink()
    with pytest.raises(ExportError, match="cancelled by progress"):
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, progress=lambda *_: False)
    assert untouched(engine_file)


def test_an_error_in_progress_is_raised_after_the_build(onnx_file: Path, engine_file: Path) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in the listener")

    with pytest.raises(ZeroDivisionError, match="in the listener"):
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, progress=broken)
    assert untouched(engine_file)


def test_ctrl_c_cancels_and_leaves_nothing(onnx_file: Path, engine_file: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(phase: str, step: int, steps: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, progress=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert untouched(engine_file)


def test_the_bar_is_drawn_on_stderr(
    onnx_file: Path, engine_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, progress=True)
    shown = capsys.readouterr()
    assert "model.onnx: " in shown.err
    assert shown.out == ""
    build_engine(onnx_file, engine_file, backend="tensorrt_rtx", profiles=PROFILE, progress=False)
    assert "model.onnx" not in capsys.readouterr().err


@pytest.fixture(params=["10.16.1", "11.4.0"])
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake(request.param)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "tensorrt" else None)
    monkeypatch.setattr(backend, "_import", lambda op, name: module)
    return module


def test_full_tensorrt_gets_a_strongly_typed_network(full: Any, onnx_file: Path, engine_file: Path, tmp_path: Path) -> None:
    """By the fake: 10 needs EXPLICIT_BATCH and STRONGLY_TYPED, 11 has only the latter; no precision flag is ever set."""
    (tmp_path / "cache").write_bytes(b"old")
    report = build_engine(
        onnx_file, engine_file, backend="tensorrt", profiles=PROFILE, timing_cache=tmp_path / "cache", max_aux_streams=2,
        optimization_level=5, hardware_compatibility="ampere_plus", version_compatible=True, memory_pools={"workspace": 1 << 30},
    )  # fmt: skip
    calls = {call[0]: call[1:] for call in full.calls}
    flags = full.NetworkDefinitionCreationFlag
    assert calls["create_network"] == (sum(1 << flag for flag in flags),)
    assert calls["create_network"] == ((3,) if full.__version__.startswith("10") else (1,))
    assert calls["builder_optimization_level"] == (5,)
    assert calls["max_aux_streams"] == (2,)
    assert calls["hardware_compatibility_level"] == (full.HardwareCompatibilityLevel.AMPERE_PLUS,)
    assert calls["set_memory_pool_limit"] == ("WORKSPACE", 1 << 30)
    assert calls["add_optimization_profile"] == (PROFILE,)
    assert {call[1] for call in full.calls if call[0] == "set_flag"} == {"VERSION_COMPATIBLE"}
    assert {call[1] for call in full.calls if call[0] == "clear_flag"} == {"TF32", "REFIT", "STRIP_PLAN"}
    assert calls["create_timing_cache"] == (b"old",)
    assert (tmp_path / "cache").read_bytes() == b"old+timed"
    assert engine_file.read_bytes() == PLAN
    assert report.backend == "tensorrt"
    assert report.version == full.__version__
    assert report.warnings == ("warning: a fake warning",)


def test_ctrl_c_while_parsing_is_not_lost(
    full: Any, onnx_file: Path, engine_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fake: TensorRT swallows what its callbacks raise, so a KeyboardInterrupt in the logger would vanish."""
    parse = full.OnnxParser.parse_from_file

    def interrupted(self: Any, path: str) -> bool:
        with contextlib.suppress(BaseException):  # as the bindings do
            os.kill(os.getpid(), signal.SIGINT)
        return bool(parse(self, path))

    monkeypatch.setattr(full.OnnxParser, "parse_from_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx_file, engine_file, backend="tensorrt", profiles=PROFILE)
    assert ("build_serialized_network",) not in full.calls
    assert untouched(engine_file)


def test_full_tensorrt_builds_for_its_own_gpu_only(full: Any, onnx_file: Path, engine_file: Path) -> None:
    with pytest.raises(ExportError, match=r"compute_capability: not possible with tensorrt .*the GPU it runs on"):
        build_engine(onnx_file, engine_file, backend="tensorrt", profiles=PROFILE, compute_capability="8.9")
    assert full.calls == []
    assert untouched(engine_file)


def test_full_tensorrt_refits_where_there_is_a_gpu(
    full: Any, onnx_file: Path, engine_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_ops.export.tensorrt.config.has_gpu", lambda: True)
    build_engine(onnx_file, engine_file, backend="tensorrt", profiles=PROFILE, refit=True, strip_weights=True)
    assert {call[1] for call in full.calls if call[0] == "set_flag"} == {"REFIT", "STRIP_PLAN"}


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = {"tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: SimpleNamespace() if name in installed else None)
    monkeypatch.setattr(backend, "_import", lambda op, name: name)
    for gpu, expected in ((True, "tensorrt"), (False, "tensorrt_rtx")):
        monkeypatch.setattr(backend, "has_gpu", lambda gpu=gpu: gpu)
        assert backend.load_backend("op").name == expected
    installed.clear()
    with pytest.raises(ModuleNotFoundError, match=r"not installed.*fused-ops\[tensorrt-rtx\].*fused-ops\[tensorrt\]"):
        backend.load_backend("op")


def test_a_library_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    with pytest.raises(ExportError, match=r"tensorrt_rtx is installed but does not load: libnvinfer\.so"):
        backend.load_backend("op", "tensorrt_rtx")


def test_the_default_follows_torchs_tf32_default() -> None:
    assert build_engine.__kwdefaults__["tf32"] is torch.backends.cuda.matmul.allow_tf32 is False
