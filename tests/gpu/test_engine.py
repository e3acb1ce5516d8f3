"""A TensorRT-RTX engine run on the GPU, against ONNX Runtime and against itself on other streams. Needs a GPU that RTX supports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_ops.export import Engine, build_engine
from tests.export.onnx_files import PROFILE, linear_model, save

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LONG = {"x": ((1, 33, 16), (1, 64, 16), (2, 512, 16))}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("engine")
    path = save(linear_model(), folder / "model.onnx")
    report = build_engine(path, folder / "model.engine", backend="tensorrt_rtx", profiles=[PROFILE, LONG], progress=False)
    return path, report.path, report.sha256


def expected(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0]).to(x.device)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 32), (2, 511)])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_dynamic_shapes_match_onnx_runtime(paths: tuple[Path, Path, str], shape: tuple[int, int], cuda_graph: bool) -> None:
    x = torch.randn(*shape, 16, device="cuda")
    with Engine.load(paths[1], sha256=paths[2]) as engine:
        context = engine.context(engine.profile_for({"x": x}), cuda_graph=cuda_graph)
        for _ in range(3):
            torch.testing.assert_close(context(x)["y"], expected(paths[0], x), rtol=1e-5, atol=1e-5)


def test_contexts_on_several_streams(paths: tuple[Path, Path, str]) -> None:
    with Engine.load(paths[1], sha256=paths[2]) as engine:
        contexts = [engine.context() for _ in range(4)]
        streams = [torch.cuda.Stream() for _ in contexts]
        inputs = [torch.randn(rows, 32, 16, device="cuda") for rows in (1, 3, 5, 8)]
        torch.cuda.synchronize()
        results = []
        for context, stream, x in zip(contexts, streams, inputs):
            with torch.cuda.stream(stream):
                results.append(context(x)["y"])
        torch.cuda.synchronize()
        for x, y in zip(inputs, results):
            torch.testing.assert_close(y, expected(paths[0], x), rtol=1e-5, atol=1e-5)


def test_the_runtime_cache_is_kept(paths: tuple[Path, Path, str], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, device="cuda")
    sizes = []
    for _ in range(2):
        with Engine.load(paths[1], sha256=paths[2], runtime_cache=tmp_path / "cache") as engine:
            torch.testing.assert_close(engine(x)["y"], expected(paths[0], x), rtol=1e-5, atol=1e-5)
        sizes.append((tmp_path / "cache").stat().st_size)
    assert sizes[0] > 0
    assert sizes[1] >= sizes[0]


def test_the_layer_report_names_layers(paths: tuple[Path, Path, str]) -> None:
    with Engine.load(paths[1], sha256=paths[2]) as engine:
        assert len(engine.layers()) > 0
