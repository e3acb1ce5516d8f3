"""Engine where there is no GPU: what is checked before one is needed, for real; the rest of its plumbing by a fake runtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_ops.export import Engine, ExportError, build_engine
from fused_ops.export.files.manifest import manifest_path
from fused_ops.export.tensorrt import context as context_module
from fused_ops.export.tensorrt import engine
from fused_ops.export.tensorrt.backend import Backend, EngineError, has_gpu
from tests.export.fake_runtime import FakeCuda, FakeEngine, fake_runtime
from tests.export.onnx_files import PROFILE, linear_model, save

DIGEST = hashlib.sha256(b"engine").hexdigest()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for module in (engine, context_module):
        monkeypatch.setattr(module, "cuda", fake)
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    return fake


@pytest.fixture
def make(cuda: FakeCuda) -> Callable[..., Engine]:
    def build(rtx: bool = False, **options: Any) -> Engine:
        backend = Backend("tensorrt_rtx" if rtx else "tensorrt", fake_runtime(cuda, rtx=rtx))
        logger = backend.logger()
        return Engine(backend, FakeEngine(cuda, logger, **options), logger, torch.device("cpu"), None)

    return build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A real RTX engine and its SHA-256."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engine")
    path = save(linear_model(), folder / "model.onnx")
    report = build_engine(path, folder / "model.engine", backend="tensorrt_rtx", profiles=PROFILE)
    return report.path, report.sha256


# Before a GPU is needed: real files.


def test_a_changed_engine_is_not_loaded(built: tuple[Path, str], tmp_path: Path) -> None:
    data = bytearray(built[0].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.engine").write_bytes(data)
    with pytest.raises(ExportError, match=rf"got SHA-256 \w+, allowed: {built[1]}; not loaded"):
        Engine.load(tmp_path / "changed.engine", sha256=built[1])
    manifest_path(tmp_path / "changed.engine").write_bytes(manifest_path(built[0]).read_bytes())
    with pytest.raises(ExportError, match=rf"its manifest says {built[1]}; not loaded"):
        Engine.load(tmp_path / "changed.engine")


@pytest.mark.parametrize("digest", ["", "abc", "x" * 64], ids=["empty", "short", "no hex"])
def test_a_malformed_hash_is_refused(built: tuple[Path, str], digest: str) -> None:
    with pytest.raises(ExportError, match=r"sha256: got .*64 hexadecimal digits"):
        Engine.load(built[0], sha256=digest)


GOOD: dict[str, Any] = {"manifest": 1, "kind": "tensorrt", "sha256": "0"}
MALFORMED: dict[str, str] = {
    "cut": "{",
    "list": "[]",
    "format": json.dumps(GOOD | {"manifest": 9}),
    "deep": "[" * 100_000,
    "no kind": json.dumps({"manifest": 1, "sha256": "0"}),
    "hash": json.dumps(GOOD | {"sha256": 0}),
    "inputs": json.dumps(GOOD | {"inputs": 5}),
    "a port": json.dumps(GOOD | {"outputs": [{"name": "x"}]}),
    "dims": json.dumps(GOOD | {"inputs": [{"name": "x", "dtype": "FLOAT", "dims": [None]}]}),
    "profiles": json.dumps(GOOD | {"profiles": [{"x": [[1], [2]]}]}),
    "external data": json.dumps(GOOD | {"external_data": {"w": 1}}),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.engine").write_bytes(b"engine")
    manifest_path(tmp_path / "m.engine").write_text(text)
    with pytest.raises(ExportError, match=r"m\.engine\.manifest\.json' is no"):
        Engine.load(tmp_path / "m.engine")


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_missing_or_empty_engine_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "m.engine").write_bytes(content)
    with pytest.raises(ExportError, match=r"Engine.load: path: got .*m\.engine"):
        Engine.load(tmp_path / "m.engine")


def test_a_too_large_engine_is_refused(built: tuple[Path, str]) -> None:
    with pytest.raises(ExportError, match="allowed: 1 to 1000 bytes"):
        Engine.load(built[0], max_bytes=1000)


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_given(built: tuple[Path, str]) -> None:
    with pytest.raises(ExportError, match="an engine runs on a CUDA device, and torch sees none"):
        Engine.load(built[0], sha256=built[1])


# By the fake: what is called, in which order, and that results come from the addresses handed over.


def loads(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, path: Path, rtx: bool = False, **options: Any) -> None:
    module = fake_runtime(cuda, rtx=rtx, **options)
    monkeypatch.setattr(engine, "load_backend", lambda op, name: Backend("tensorrt_rtx" if rtx else "tensorrt", module))
    path.write_bytes(b"engine")


def test_the_bytes_hashed_are_the_bytes_loaded(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, cuda, tmp_path / "m.engine")
    with pytest.raises(ExportError, match="not loaded"):
        Engine.load(tmp_path / "m.engine", sha256="0" * 64)
    assert cuda.calls == []
    with Engine.load(tmp_path / "m.engine", sha256=DIGEST.upper()) as loaded:
        assert cuda.calls == [("deserialize", b"engine")]
        assert loaded.device == torch.device("cuda", 0)
        assert loaded.layers() == ["product", "activation"]
    with pytest.raises(ExportError, match="it is closed"):
        loaded.context()


def test_what_tensorrt_says_is_in_the_exception(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, cuda, tmp_path / "m.engine", loads=False)
    with pytest.raises(EngineError, match=r"does not load .*\n  error: a fake version mismatch"):
        Engine.load(tmp_path / "m.engine")


def test_a_device_that_is_no_gpu_is_refused(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, cuda, tmp_path / "m.engine")
    with pytest.raises(ExportError, match="device: got cpu, allowed: a CUDA device"):
        Engine.load(tmp_path / "m.engine", device="cpu")


def test_the_runtime_cache_is_read_and_written_back(cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads(monkeypatch, cuda, tmp_path / "m.engine", rtx=True)
    for expected in (b"+kernels", b"+kernels+kernels"):
        Engine.load(tmp_path / "m.engine", runtime_cache=tmp_path / "cache").close()
        assert (tmp_path / "cache").read_bytes() == expected
    loads(monkeypatch, cuda, tmp_path / "m.engine", rtx=False)
    with pytest.raises(ExportError, match=r"runtime_cache: not possible with tensorrt: .*timing_cache"):
        Engine.load(tmp_path / "m.engine", runtime_cache=tmp_path / "cache")


def test_inputs_are_moved_on_request(make: Callable[..., Engine]) -> None:
    loaded, x = make(), torch.randn(2, 4)
    assert loaded.moved([x]) == [x]
    loaded.device = torch.device("meta")
    assert loaded.moved([x])[0].device == torch.device("meta")


@pytest.mark.parametrize("rows", [1, 8, 9, 64])
def test_the_profile_is_chosen_by_shape(make: Callable[..., Engine], rows: int) -> None:
    loaded, x = make(), torch.randn(rows, 4)
    torch.testing.assert_close(loaded(x)["y"], 2 * x, rtol=0, atol=0)
    torch.testing.assert_close(loaded(x=x)["y"], 2 * x, rtol=0, atol=0)
    assert list(loaded._contexts) == [0 if rows <= 8 else 1]
    assert loaded.native.cuda.calls.count(("profile", 1)) == (rows > 8)


def test_a_strided_input_is_read_as_it_looks(make: Callable[..., Engine]) -> None:
    x = torch.randn(4, 5).t()[:, :4].t().t()
    assert not x.is_contiguous()
    torch.testing.assert_close(make()(x)["y"], 2 * x, rtol=0, atol=0)


BAD_INPUTS: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "name": (lambda: ((), {"z": torch.ones(2, 4)}), r"missing, unknown or repeated: x, z, allowed: x"),
    "twice": (lambda: ((torch.ones(2, 4),), {"x": torch.ones(2, 4)}), "repeated: x"),
    "too many": (lambda: ((torch.ones(2, 4),) * 2, {}), "got 2 inputs, allowed: 1, x"),
    "dtype": (
        lambda: ((torch.ones(2, 4, dtype=torch.float16),), {}),
        "x: got torch.float16 on cpu, allowed: torch.float32 on cpu",
    ),
    "device": (lambda: ((torch.ones(2, 4, device="meta"),), {}), "x: got torch.float32 on meta"),
    "no tensor": (lambda: (([1.0],), {}), "x: got list"),
    "shape": (
        lambda: ((torch.ones(65, 4),), {}),
        r"got x \(65, 4\), allowed: x from \(1, 4\) to \(8, 4\); x from \(9, 4\) to \(64, 4\)",
    ),
    "rank": (lambda: ((torch.ones(4),), {}), r"got x \(4,\), allowed"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_is_named_before_anything_runs(make: Callable[..., Engine], case: str) -> None:
    arguments, message = BAD_INPUTS[case]
    args, inputs = arguments()
    loaded = make()
    with pytest.raises(ExportError, match=message):
        loaded(*args, **inputs)
    assert loaded.native.contexts == []


def test_a_context_admits_its_own_profile_only(make: Callable[..., Engine]) -> None:
    loaded = make()
    with pytest.raises(ExportError, match=r"got shape \(9, 4\), allowed by profile 0: from \(1, 4\) to \(8, 4\)"):
        loaded.context(0)(torch.ones(9, 4))
    with pytest.raises(ExportError, match="profile: got 2, allowed: 0 to 1"):
        loaded.context(2)


def test_streams(make: Callable[..., Engine], cuda: FakeCuda) -> None:
    """The default stream is stood in for by one of our own, joined at both ends; any other is used as it is."""
    context = make().context()
    cuda.calls.clear()
    context(torch.ones(2, 4))
    assert cuda.calls == [("wait", 1, 0), ("execute", 1, (2, 4)), ("wait", 0, 1)]
    cuda.calls.clear()
    other = cuda.Stream()
    with cuda.stream(other):
        context(torch.ones(2, 4))
    assert cuda.calls == [("execute", other.cuda_stream, (2, 4))]


def test_contexts_are_separate(make: Callable[..., Engine]) -> None:
    loaded = make()
    first, second = loaded.context(), loaded.context()
    assert len({id(native) for native in loaded.native.contexts}) == 2
    a, b = torch.randn(2, 4), torch.randn(3, 4)
    results = first(a)["y"], second(b)["y"]
    torch.testing.assert_close(results, (2 * a, 2 * b), rtol=0, atol=0)


def test_outputs_are_new_or_the_callers(make: Callable[..., Engine]) -> None:
    context, x = make().context(), torch.randn(2, 4)
    kept = [context(torch.full((2, 4), float(i)))["y"] for i in range(3)]
    assert [tensor[0, 0].item() for tensor in kept] == [0.0, 2.0, 4.0]
    y = torch.empty(2, 4)
    assert context(x, out={"y": y})["y"] is y
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
    for wrong in (torch.empty(3, 4), torch.empty(2, 4, dtype=torch.float64), torch.empty(4, 2).t()):
        with pytest.raises(ExportError, match=r"out\['y'\]: got .*allowed: contiguous torch.float32 \(2, 4\) on cpu"):
            context(x, out={"y": wrong})
    with pytest.raises(ExportError, match="out: got z, allowed: y"):
        context(x, out={"z": y})


def test_an_output_whose_shape_depends_on_the_data(make: Callable[..., Engine]) -> None:
    context, x = make(data_dependent=True).context(), torch.randn(5, 4)
    torch.testing.assert_close(context(x)["y"], 2 * x, rtol=0, atol=0)
    y = torch.empty(5, 4)
    context(x, out={"y": y})
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)


def test_a_graph_is_captured_once_a_shape_and_replayed(make: Callable[..., Engine], cuda: FakeCuda) -> None:
    loaded = make()
    context = loaded.context(cuda_graph=True)
    kept = []
    for rows in (2, 3, 2, 3, 2):
        x = torch.randn(rows, 4)
        kept.append((x, context(x)["y"]))
    for x, y in kept:
        torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
    assert [call for call in cuda.calls if call[0] == "execute"] == [
        ("execute", 1, (2, 4)), ("execute", 1, (2, 4)), ("execute", 1, (3, 4)), ("execute", 1, (3, 4)),
    ]  # fmt: skip
    for rows in range(1, 9):
        context(torch.ones(rows, 4))
    assert len(context._graphs) == context.MAX_GRAPHS
    with pytest.raises(ExportError, match="cuda_graph: not possible: an output's shape depends on the data"):
        make(data_dependent=True).context(cuda_graph=True)(torch.ones(2, 4))


def test_rtx_captures_its_graphs_itself(make: Callable[..., Engine], cuda: FakeCuda) -> None:
    """It needs to see the same addresses again: the context keeps buffers, a set for each set of shapes."""
    loaded = make(rtx=True)
    context = loaded.context(cuda_graph=True)
    kept = [(x, context(x)["y"]) for x in (torch.randn(2, 4), torch.randn(2, 4))]
    addresses = dict(loaded.native.contexts[0].addresses)
    kept.append((x := torch.randn(2, 4), context(x)["y"]))
    assert loaded.native.contexts[0].addresses == addresses
    kept.append((x := torch.randn(2, 4), loaded.context()(x)["y"]))
    for x, y in kept:
        torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
    assert [native.config.cuda_graph_strategy for native in loaded.native.contexts] == ["whole", "disabled"]
    assert cuda.capturing is None


def test_a_failed_execution_raises(make: Callable[..., Engine]) -> None:
    loaded = make()
    loaded.native.fails = True
    with pytest.raises(EngineError, match=r"the execution was refused:\n  error: a fake failure"):
        loaded(torch.ones(2, 4))


def test_closing_waits_for_the_device_and_is_final(make: Callable[..., Engine], cuda: FakeCuda) -> None:
    with make() as loaded:
        context = loaded.context()
        loaded(torch.ones(2, 4))
    assert cuda.calls[-1] == ("synchronize device",)
    assert context._native is None
    loaded.close()
    for call in (lambda: loaded(torch.ones(2, 4)), lambda: context(torch.ones(2, 4)), loaded.layers, lambda: loaded.refit("m")):
        with pytest.raises(ExportError, match="it is closed"):
            call()
