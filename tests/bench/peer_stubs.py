"""Stand-ins for the peers: modules with the peers' names and signatures, which compute by torch.

SIGNATURES holds what inspect.signature gave, without annotations, for the real functions of VERSIONS.
"""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

VERSIONS = {"liger_kernel": "0.8.5", "quack": "0.6.5", "flag_gems": "5.0.2"}
SIGNATURES = {
    "liger_kernel.transformers.functional.liger_softmax": "(x)",
    "liger_kernel.transformers.functional.liger_layer_norm": "(X, W, B, eps)",
    "liger_kernel.transformers.functional.liger_swiglu": "(a, b)",
    "liger_kernel.transformers.functional.liger_geglu": "(a, b)",
    "quack.softmax": "(x)",
    "quack.rmsnorm.layernorm_fwd": "(x, weight, bias=None, eps=1e-06, return_rstd=False, return_mean=False)",
    "quack.rmsnorm.layernorm_bwd": "(x, weight, dout, rstd, mean, has_bias=True)",
    "quack.gemm_interface.gemm_act": (
        "(A, B, C=None, bias=None, activation=None, alpha=1.0, preact_out=None, postact_out=None, out_dtype=None, "
        "postact_dtype=None, cu_seqlens_m=None, A_idx=None, store_preact=True, dynamic_scheduler=False, tuned=True, "
        "config=None, concat_layout=None, split_k=1, split_k_mode=0)"
    ),
    "quack.gemm_interface.gemm_gated": (
        "(A, B, C=None, bias=None, activation=None, alpha=1.0, preact_out=None, postact_out=None, out_dtype=None, "
        "postact_dtype=None, cu_seqlens_m=None, A_idx=None, store_preact=True, dynamic_scheduler=False, tuned=True, "
        "config=None, concat_layout=None, split_k=1, split_k_mode=0)"
    ),
    "quack.mlp.mlp_func": (
        "(x, weight1, weight2, activation, bias1=None, bias2=None, fuse_grad_accum=False, tuned=True, recompute=False, "
        "concat_layout=False)"
    ),
    "flag_gems.softmax": "(self, dim, half_to_float=False)",
    "flag_gems.softmax_backward": "(grad_output, output, dim, input_dtype)",
    "flag_gems.layer_norm": "(input, normalized_shape, weight=None, bias=None, eps=1e-05)",
    "flag_gems.layer_norm_backward": (
        "(grad_out, input, normalized_shape, mean, rstd, weight=None, bias=None, output_mask=None)"
    ),
}
QUACK_ACTIVATIONS = {
    "silu": F.silu, "relu": F.relu, "relu_sq": lambda x: F.relu(x).square(), "tanh": torch.tanh,
    "gelu_tanh_approx": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
QUACK_GATES = {"swiglu": F.silu, "reglu": F.relu, "glu": torch.sigmoid, "geglu": lambda x: F.gelu(x, approximate="tanh")}


def computes(name: str) -> Any:
    """What the peer's function of that name computes, by torch; it takes all arguments by name."""
    return _COMPUTES[name.rpartition(".")[2] if name.startswith("quack.") or "liger" in name else name]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    mean, rstd = wide.mean(-1), (wide.var(-1, unbiased=False) + eps).rsqrt()
    y = (wide - mean[:, None]) * rstd[:, None] * weight.float() + bias.float()
    return y.to(x.dtype), mean, rstd


def _layer_norm_backward(x: Tensor, weight: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_hat, wide = (x.float() - mean[:, None]) * rstd[:, None], dy.float()
    g = wide * weight.float()
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide * x_hat).sum(0).to(weight.dtype), wide.sum(0).to(weight.dtype)


def _quack_fwd(x, weight, bias, eps, return_rstd, return_mean):  # type: ignore[no-untyped-def]
    assert x.dim() == 2
    assert weight.dtype == torch.float32
    assert bias.dtype == torch.float32
    y, mean, rstd = _layer_norm(x, weight, bias, eps)
    return (y, rstd, mean) if return_rstd and return_mean else y


def _quack_bwd(x, weight, dout, rstd, mean, has_bias):  # type: ignore[no-untyped-def]
    return _layer_norm_backward(x, weight, dout, mean, rstd)


def _quack_gemm(*, A, B, bias, activation, store_preact, tuned, **others):  # type: ignore[no-untyped-def]
    assert not tuned
    assert not store_preact
    pre = A.float() @ B.float() + (0 if bias is None else bias.float())
    if activation in QUACK_GATES:
        return None, (QUACK_GATES[activation](pre[:, 0::2]) * pre[:, 1::2]).to(A.dtype)
    return None, QUACK_ACTIVATIONS[activation](pre).to(A.dtype)


def _quack_mlp(*, x, weight1, weight2, activation, bias1, bias2, tuned, **others):  # type: ignore[no-untyped-def]
    assert not tuned
    return F.linear(QUACK_ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)


def _gems_softmax_backward(grad_output, output, dim, input_dtype):  # type: ignore[no-untyped-def]
    y, dy = output.float(), grad_output.float()
    return (y * (dy - (y * dy).sum(dim, keepdim=True))).to(input_dtype)


def _gems_layer_norm(input, normalized_shape, weight, bias, eps):  # type: ignore[no-untyped-def]
    assert isinstance(normalized_shape, list)
    return _layer_norm(input, weight, bias, eps)


def _gems_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask):  # type: ignore[no-untyped-def]
    assert output_mask == [True, True, True]
    return _layer_norm_backward(input, weight, grad_out, mean, rstd)


_COMPUTES: dict[str, Any] = {
    "liger_softmax": lambda x: x.softmax(-1),
    "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
    "liger_swiglu": lambda a, b: F.silu(a) * b,
    "liger_geglu": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "softmax": lambda x: x.softmax(-1),
    "layernorm_fwd": _quack_fwd,
    "layernorm_bwd": _quack_bwd,
    "gemm_act": _quack_gemm,
    "gemm_gated": _quack_gemm,
    "mlp_func": _quack_mlp,
    "flag_gems.softmax": lambda self, dim, half_to_float: self.softmax(dim),
    "flag_gems.softmax_backward": _gems_softmax_backward,
    "flag_gems.layer_norm": _gems_layer_norm,
    "flag_gems.layer_norm_backward": _gems_layer_norm_backward,
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the peers would be imported from, for one test."""
    for name, signature in SIGNATURES.items():
        path, _, function = name.rpartition(".")
        module = _module(monkeypatch, path)
        monkeypatch.setattr(module, function, _with_signature(signature, computes(name)), raising=False)
    _module(monkeypatch, "sqlalchemy")


def _with_signature(signature: str, compute: Any) -> Any:
    """A function of that signature, which hands every argument on by its name."""
    scope: dict[str, Any] = {}
    exec(f"def stub{signature}: pass", scope)
    declared = inspect.signature(scope["stub"])

    def stub(*args: Any, **kwargs: Any) -> Any:
        bound = declared.bind(*args, **kwargs)
        bound.apply_defaults()
        return compute(**bound.arguments)

    stub.__signature__ = declared  # type: ignore[attr-defined]
    return stub


def _module(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """sys.modules' stand-in for path and for the packages above it."""
    if not isinstance(sys.modules.get(path), _Stub):
        stub = _Stub(path)
        stub.__path__ = []
        stub.__spec__ = ModuleSpec(path, None, is_package=True)
        monkeypatch.setitem(sys.modules, path, stub)
        above, _, last = path.rpartition(".")
        if above:
            monkeypatch.setattr(_module(monkeypatch, above), last, stub, raising=False)
    return sys.modules[path]


class _Stub(ModuleType):
    """A stand-in, told from a real module by its type."""
