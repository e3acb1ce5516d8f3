"""The peers: each call binds to the signature of the real library and computes the op; each that is absent says why."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import Bundle, Measurement, prepare
from bench.provider import Unsupported, limited, missing
from bench.providers import by_name as provider_named
from bench.providers import library, peers
from bench.tasks import Task
from fused_ops import REGISTRY
from fused_ops.testing import Case
from tests.bench import peer_stubs

BF16 = torch.bfloat16


def task(op: str, pass_: str = "fwd", activation: str = "gelu_tanh", columns: int = 64, dtype: torch.dtype = BF16) -> Task:
    """A small task of the op, as the registry's benchmark cases form theirs."""

    def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def r(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        x, K = r(16, columns), columns
        return {
            "softmax": ((x,), {"dim": -1}),
            "layer_norm": ((x, (K,), r(K), r(K)), {}),
            "linear": ((x, r(32, K), r(32), activation), {}),
            "gated_linear": ((x, r(32, K), r(32, K), activation), {}),
            "mlp": ((x, r(32, K), r(32), r(K, 32), r(K), activation), {}),
        }[op]

    shape = (16, columns) if op in ("softmax", "layer_norm") else (16, 32, columns)
    return Task(REGISTRY[op], Case(f"small_{op}", dtype, shape, make), pass_, "wall")


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    peer_stubs.install(monkeypatch)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that an H100 is here, to those who only ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.fixture
def pretuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the form of helion's pretuned kernels, with a table for sm_90."""
    for op, body in {
        "softmax": "import torch\ndef softmax(x):\n    return x.softmax(1)\n",
        "layer_norm": "import torch\ndef layer_norm(x, weight, bias):\n"
        "    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias)\n",
    }.items():
        (tmp_path / op).mkdir()
        (tmp_path / op / f"{op}.py").write_text(body)
        (tmp_path / op / f"_helion_aot_{op}_cuda_sm90.py").write_text("")
        monkeypatch.delitem(sys.modules, f"helion_pretuned_{op}", raising=False)
    monkeypatch.setenv("HELION_PRETUNED", str(tmp_path))
    return tmp_path


ROW_PASSES = [(op, p) for op in ("softmax", "layer_norm") for p in ("fwd", "bwd", "fwd+bwd")]
CALLS = [
    *((peer, op, pass_, "") for peer in ("liger", "quack", "flag-gems") for op, pass_ in ROW_PASSES),
    *(("liger", "gated_linear", pass_, act) for pass_ in ("fwd", "train_fwd", "fwd+bwd") for act in ("silu", "gelu_tanh")),
    *(("quack", "linear", "fwd", act) for act in ("relu", "gelu_tanh", "silu", "relu2", "tanh")),
    *(("quack", "gated_linear", "fwd", act) for act in ("silu", "gelu_tanh", "relu", "sigmoid")),
    *(("quack", "mlp", pass_, act) for pass_ in ("fwd", "fwd+bwd") for act in ("gelu_tanh", "silu")),
]


@pytest.mark.parametrize(("peer", "op", "pass_", "activation"), CALLS)
def test_a_peers_call_binds_and_computes_the_op(stubs: None, peer: str, op: str, pass_: str, activation: str) -> None:
    measurement = Measurement(provider_named(peer), Bundle.of(task(op, pass_, activation), "cpu"))
    assert measurement.verdict.right, measurement.verdict.reason()
    assert measurement.prepared.configuration.split()[0] in (*peer_stubs.VERSIONS, "flag_gems")


@pytest.mark.parametrize("op", ["softmax", "layer_norm"])
def test_helions_pretuned_kernels(hopper: None, pretuned: Path, op: str) -> None:
    measurement = Measurement(provider_named("helion"), Bundle.of(task(op), "cpu"))
    assert measurement.verdict.right, measurement.verdict.reason()
    assert measurement.prepared.configuration.endswith("pretuned for this GPU")


def test_helions_pretuned_kernels_are_found_on_the_path(pretuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELION_PRETUNED")
    assert peers.pretuned_folder() is None
    target = pretuned.parent / f"{pretuned.name}-site"
    target.mkdir()
    (target / "pretuned_kernels").symlink_to(pretuned)
    monkeypatch.syspath_prepend(str(target))
    assert peers.pretuned_folder() == target / "pretuned_kernels"


def test_the_wrong_stub_is_noticed(stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: a peer that forgets the bias is wrong."""
    f = sys.modules["liger_kernel.transformers.functional"]
    monkeypatch.setattr(f, "liger_layer_norm", lambda X, W, B, eps: torch.nn.functional.layer_norm(X, W.shape, W, None, eps))
    assert not Measurement(provider_named("liger"), Bundle.of(task("layer_norm"), "cpu")).verdict.right


@pytest.mark.parametrize(
    ("peer", "what", "reason"),
    [
        ("liger", task("softmax", columns=65537), "at most 65536, not 65537"),
        ("liger", task("layer_norm", columns=65537), "at most 65536"),
        ("liger", task("gated_linear", "bwd", "silu"), "cannot be repeated"),
        ("liger", task("gated_linear", activation="relu"), "no relu gate"),
        ("liger", task("mlp"), "liger has no mlp"),
        ("quack", task("linear", activation="gelu"), "fuses no gelu"),
        ("quack", task("linear", "bwd"), "inference only"),
        ("quack", task("linear", dtype=torch.float32), "16 bits"),
        ("quack", task("gated_linear", "fwd+bwd", "silu"), "inference only"),
        ("quack", task("mlp", activation="gelu"), "fuses no gelu"),
        ("flag-gems", task("linear"), "flag-gems has no linear"),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else v.id,
)
def test_what_a_peer_lacks_is_unsupported(stubs: None, peer: str, what: Task, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        prepare(provider_named(peer), Bundle.of(what, "cpu"))


@pytest.mark.parametrize("peer", ["liger", "quack", "helion", "flag-gems"])
def test_without_cuda_a_peer_is_absent(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provider_named(peer).available("cuda") == "needs a CUDA device"
    assert provider_named(peer).available("cpu") == "needs a CUDA device"


@pytest.mark.parametrize(
    ("peer", "module"),
    [("liger", "liger_kernel"), ("quack", "quack"), ("helion", "helion"), ("flag-gems", "flag_gems")],
)
def test_a_peer_that_fails_at_import_is_absent_with_its_message(
    peer: str, module: str, hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever it raises, first line only; and one that is not there says so."""
    for name in [m for m in sys.modules if m.split(".")[0] in (module, "sqlalchemy")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("FLAGGEMS_CACHE_DIR", str(tmp_path))
    (tmp_path / "sqlalchemy.py").write_text("")
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise RuntimeError('no such driver\\nsecond line')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert provider_named(peer).available("cuda") == f"import {module} failed: RuntimeError: no such driver"


def test_a_peer_that_is_not_installed_is_absent(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.Liger, "module", "nowhere_kernel")
    assert missing("nowhere_kernel") == "nowhere_kernel is not installed"


def test_helion_without_pretuned_kernels_is_absent(
    hopper: None, stubs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peer_stubs._module(monkeypatch, "helion")
    monkeypatch.delenv("HELION_PRETUNED", raising=False)
    assert "the wheel has none" in provider_named("helion").available("cuda")
    monkeypatch.setenv("HELION_PRETUNED", str(tmp_path))
    assert "no pretuned kernels in" in provider_named("helion").available("cuda")


def test_quack_needs_hopper(hopper: None, stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provider_named("quack").available("cuda") == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert provider_named("quack").available("cuda") == "quack needs compute capability 9.0, this is 8.0"


def test_flag_gems_writes_nothing_to_the_home(hopper: None, stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is a temporary folder, chosen before the import; a user's own choice stays."""
    monkeypatch.setenv("FLAGGEMS_CACHE_DIR", "mine")
    provider_named("flag-gems").available("cuda")
    assert os.environ["FLAGGEMS_CACHE_DIR"] == "mine"
    monkeypatch.delenv("FLAGGEMS_CACHE_DIR")
    module = sys.modules.pop("flag_gems")
    monkeypatch.setattr(peers, "missing", lambda *_: "")
    provider_named("flag-gems").available("cuda")
    sys.modules["flag_gems"] = module
    assert Path(os.environ["FLAGGEMS_CACHE_DIR"]).is_dir()
    assert Path.home() not in Path(os.environ["FLAGGEMS_CACHE_DIR"]).parents


def spin() -> None:
    """A library that never gets ready, and keeps every exception it can."""
    try:
        while True:
            pass
    except Exception:
        spin()


def test_a_peer_that_takes_long_is_unsupported(stubs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    f = sys.modules["liger_kernel.transformers.functional"]
    monkeypatch.setattr(f, "liger_softmax", lambda x: spin())
    monkeypatch.setattr(library, "PREPARE_S", 0.1)
    with pytest.raises(Unsupported, match=r"liger took more than 0\.1 s to get ready"):
        prepare(provider_named("liger"), Bundle.of(task("softmax"), "cpu"))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_limit_leaves_the_timer_of_others_as_it_was() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with limited(500, "nothing"):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_hidden_entry_points_of_torch_take_our_arguments() -> None:
    addmm = torch.ops.aten._addmm_activation.default._schema
    assert [a.name for a in addmm.arguments][:3] == ["self", "mat1", "mat2"]
    assert {"use_gelu"} <= {a.name for a in addmm.arguments if a.kwarg_only}
    scaled = [a.name for a in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert scaled[:4] == ["self", "mat2", "scale_a", "scale_b"]
    assert {"bias", "out_dtype"} <= set(scaled)
    x, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    out = torch._addmm_activation(bias, x, weight.t(), use_gelu=False)
    torch.testing.assert_close(out, torch.relu(x @ weight.t() + bias))
