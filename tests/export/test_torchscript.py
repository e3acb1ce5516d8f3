"""export_torchscript: files that Python and C++ load without fused_ops."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from fused_ops import fused_layernorm, fused_linear, fused_softmax
from fused_ops.export import ExportError, export_torchscript, verify
from tests.export import models

SHAPES = [models.example(1, 1), models.example(3, 7)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


@pytest.mark.parametrize("mode", ["trace", "script"])
@pytest.mark.parametrize("name", ["mlp", "decoder", "vit"])
def test_blocks(name: str, mode: str, path: Path) -> None:
    model = models.make(name)
    export_torchscript(model, (models.example(),), path, mode=mode)
    report = verify(path, model, SHAPES, max_relative_error=2e-6)
    assert report.ok, str(report)


class Calls(nn.Module):
    """The three public functions in a model that torch.jit.script takes too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, models.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = fused_layernorm(x, [x.size(-1)], None, None, 1e-5)
        return fused_softmax(fused_linear(x, self.weight, None, "gelu"), dim=1)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each file, what one process without fused_ops computes with it at another shape, and what the model does."""
    torch.manual_seed(0)
    folder, x, calls = tmp_path_factory.mktemp("elsewhere"), models.example(3, 9), Calls().eval()
    cases = {"trace": calls, "script": calls, "decoder": models.make("decoder")}
    for name, model in cases.items():
        export_torchscript(model, (models.example(),), folder / f"{name}.pt", mode="script" if name == "script" else "trace")
    torch.save(x, folder / "x.pt")
    code = f"""
import torch
x = torch.load("x.pt", weights_only=True)
torch.save({{name: torch.jit.load(name + ".pt")(x).detach() for name in {list(cases)}}}, "y.pt")
"""
    models.without_fused_ops(code, folder)
    got = torch.load(folder / "y.pt", weights_only=True)
    with torch.no_grad():
        return {name: (got[name], model(x)) for name, model in cases.items()}


@pytest.mark.xdist_group("export-elsewhere")
@pytest.mark.parametrize("name", ["trace", "script", "decoder"])
def test_loads_without_fused_ops(name: str, elsewhere: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    got, expected = elsewhere[name]
    torch.testing.assert_close(got, expected)


def test_script_keeps_control_flow(path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return fused_softmax(x, -1)
            return -x

    export_torchscript(Branch(), (torch.ones(2, 3),), path, mode="script")
    assert verify(path, Branch(), [torch.ones(2, 3), -torch.ones(2, 3)]).ok


def test_freeze(path: Path) -> None:
    model = models.make("mlp")
    export_torchscript(model, (models.example(),), path, freeze=True)
    assert not list(torch.jit.load(str(path)).parameters())
    assert verify(path, model, SHAPES).ok


def test_keywords_and_named_results(path: Path) -> None:
    class Named(nn.Module):
        def forward(self, a: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"soft": fused_softmax(a * scale), "scaled": a * scale}

    inputs = {"scale": torch.tensor(2.0), "a": models.example()}
    export_torchscript(Named(), inputs, path)
    report = verify(path, Named(), inputs)
    assert report.ok, str(report)
    assert [row.output for row in report.rows] == ["soft", "scaled"]
    extra = {"fused_ops.json": ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    assert json.loads(extra["fused_ops.json"])["outputs"] == ["soft", "scaled"]
    assert [a.debugName().partition(".")[0] for a in loaded.graph.inputs()][1:] == ["a", "scale"]


def test_absent_inputs_and_results(path: Path) -> None:
    class Optional(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, None, list[torch.Tensor]]:
            return fused_softmax(x if mask is None else x + mask), None, [x * 2]

    export_torchscript(Optional(), {"x": models.example(), "mask": None}, path)
    result = torch.jit.load(str(path))(models.example(1, 3))
    assert [tuple(t.shape) for t in result] == [(1, 3, models.WIDTH)] * 2


def test_script_that_computes_something_else_is_refused(path: Path) -> None:
    class Differs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_scripting():
                return x + 1
            return x

    with pytest.raises(ExportError, match=r"torch\.jit\.script cannot take the model: Tensor-likes are not close"):
        export_torchscript(Differs(), (models.example(),), path, mode="script")


def test_custom_operators_are_refused(path: Path) -> None:
    """A file that calls fused_ops' operators loads here and nowhere else."""

    class Raw(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fused_ops.softmax_fwd(x, -1, None)

    with pytest.raises(ExportError, match="the graph calls fused_ops::softmax_fwd"):
        export_torchscript(Raw(), (models.example(),), path)
    assert not list(path.parent.iterdir())


def test_training_mode_is_left_as_it_was(path: Path) -> None:
    model = nn.Sequential(nn.Linear(models.WIDTH, 4), nn.Dropout(0.9)).train()
    export_torchscript(model, (models.example(),), path)
    assert model.training
    assert model[1].training
    assert verify(path, model, models.example()).ok


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "jit"}, ExportError, "mode: got 'jit', allowed: 'trace', 'script'"),
        ({"model": 3}, TypeError, "model: got int"),
        ({"args": "x"}, TypeError, "args: got str"),
        ({"path": "missing/model.pt"}, ExportError, "path: got"),
        ({"args": (torch.randn(2, 3),)}, ExportError, r"torch\.jit\.trace cannot take the model"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": models.make("mlp"), "args": (models.example(),), "path": "model.pt", "mode": "trace"}
    given |= arguments
    target = tmp_path / "model.pt"
    target.write_bytes(b"old")
    with pytest.raises(error, match=message):
        export_torchscript(given["model"], given["args"], tmp_path / given["path"], mode=given["mode"])
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.slow
def test_minilm_traced(path: Path) -> None:
    from fused_ops import fuse

    model = models.minilm()
    fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # transformers compares sizes too
        export_torchscript(model, models.bert_example(2, 16), path)
    report = verify(path, model, [models.bert_example(1, 7), models.bert_example(3, 33)], max_relative_error=1e-5)
    assert report.ok, str(report)
    assert [row.output for row in report.rows[:2]] == ["last_hidden_state", "pooler_output"]


PROGRAM = r"""
#include <torch/script.h>
#include <cstdio>
#include <cstdlib>
// argv: model, batch, length, width. Prints every element of the result for x = 0.01 * (0, 1, 2, ...).
int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int64_t batch = std::atoi(argv[2]), length = std::atoi(argv[3]), width = std::atoi(argv[4]);
  torch::InferenceMode guard;
  auto model = torch::jit::load(argv[1]);
  auto x = 0.01 * torch::arange(batch * length * width, torch::kFloat).reshape({batch, length, width});
  auto y = model.forward({x}).toTensor().contiguous();
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\n", y.data_ptr<float>()[i]);
  return 0;
}
"""


@pytest.mark.slow  # almost all of it is the compiler reading libtorch's headers
def test_cpp_program_runs_the_file(path: Path) -> None:
    """A libtorch program of one file, compiled here, loads a fused block and computes what Python does."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = path.parent
    (folder / "main.cpp").write_text(PROGRAM)
    includes = [f"-I{p}" for p in cpp_extension.include_paths("cpu")]
    libraries = cpp_extension.library_paths("cpu")
    command = [compiler, "-std=c++17", "-O0", "main.cpp", "-o", "run", *includes]
    command += [f"-L{p}" for p in libraries] + [f"-Wl,-rpath,{p}" for p in libraries]
    command += [
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    model = models.make("decoder")
    export_torchscript(model, (models.example(),), path)
    for batch, length in ((1, 3), (2, 6)):
        sizes = [str(batch), str(length), str(models.WIDTH)]
        ran = subprocess.run(["./run", str(path), *sizes], cwd=folder, capture_output=True, text=True, timeout=400, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        x = 0.01 * torch.arange(batch * length * models.WIDTH).float().reshape(batch, length, models.WIDTH)
        got = torch.tensor([float(line) for line in ran.stdout.split()]).reshape(x.shape)
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)
