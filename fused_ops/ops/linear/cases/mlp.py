"""Two-layer perceptron: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import empty, randn, tagged
from . import linear
from .matmul import finite, operand, rounding


@tagged(
    "gelu",
    addressing=("descriptors_recompute", "descriptors", "transposed", "gelu", "silu"),
    rough=("relu", "relu2"),
    first=("gelu", "relu", "recompute", "no_biases", "weights_t"),
)
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every activation with and without recomputation, absent biases, sizes that are no multiples of a tile, layouts."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    def case(
        name: str, x: Tensor, H: int, N: int, activation: str | None = "gelu", bias1: bool = True, bias2: bool = True,
        recompute: bool = False,
    ) -> Sample:  # fmt: skip
        K = x.shape[-1]
        weight1, weight2 = r(H, K, seed=1, scale=max(K, 1) ** -0.5), r(N, H, seed=2, scale=max(H, 1) ** -0.5)
        biases = r(H, seed=3) if bias1 else None, r(N, seed=4) if bias2 else None
        return Sample(name, (x, weight1, biases[0], weight2, biases[1], activation), {"recompute": recompute})

    for activation in (None, "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2"):
        yield case(f"{activation}", r(9, 17, scale=2.0), 21, 11, activation, recompute=activation in ("silu", "relu"))
    yield case("recompute", r(9, 17), 21, 11, recompute=True)
    yield case("no_biases", r(9, 17), 21, 11, bias1=False, bias2=False)
    for M, H, N, K in ((1, 1, 1, 1), (65, 70, 3, 33), (0, 3, 5, 4), (5, 0, 4, 3), (5, 4, 0, 3), (5, 4, 3, 0)):
        yield case(f"mhnk({M}, {H}, {N}, {K})", r(M, K), H, N)
    yield case("descriptors", r(72, 24), 40, 24)  # on Hopper: aligned for TMA, tiles that overhang
    yield case("descriptors_recompute", r(72, 24), 40, 24, "silu", recompute=True)
    yield case("1d", r(17), 21, 11)
    yield case("4d", r(2, 3, 2, 17), 21, 11)
    yield case("transposed", r(17, 9).t(), 21, 11)
    x = r(9, 17)
    yield Sample("weights_t", (x, r(17, 21, seed=1).t(), None, r(21, 11, seed=2).t(), None))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x, weight1, weight2 = (torch.zeros(shape, device=device) for shape in ((3, 4), (5, 4), (2, 5)))

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("activation", (x, weight1, None, weight2, None, "swish"), r"activation: got 'swish', allowed: None, 'relu'")
    yield refused("k", (x, weight1[:, :3], None, weight2, None), r"input: got shape \(3, 4\), allowed: last dimension K = 3")
    yield refused("h", (x, weight1, None, weight2[:, :4], None), r"weight2: got shape \(2, 4\), allowed: shape \(2, 5\)")
    yield refused("bias1", (x, weight1, x[0], weight2, None), r"bias1: got shape \(4,\), allowed: shape \(5,\)")
    yield refused("bias2", (x, weight1, None, weight2, x[0]), r"bias2: got shape \(4,\), allowed: shape \(2,\)")
    yield refused(
        "dtype", (x, weight1, None, weight2.half(), None), r"weight2: got torch\.float16, allowed: the dtype of input"
    )
    yield refused("device", (x, weight1, None, torch.zeros(2, 5, device="meta"), None), r"weight2: got a tensor on meta")
    yield refused("not_a_tensor", (x, weight1, None, None, None), r"weight2: got NoneType", TypeError)


def fwd_bound(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_pre: bool,
    save_h: bool,
) -> tuple[Expected | None, ...]:
    """h errs as fused_linear's y and is rounded: half an ulp of each term of the second product is allowed."""
    h, pre = linear.fwd_bound(x, weight1, bias1, activation, save_pre)
    assert h is not None
    W = weight2.double()
    b = W.new_zeros(W.shape[0]) if bias2 is None else bias2.double()
    terms = max(weight1.shape[0], 1) ** 0.5 * (h.value.abs() @ W.t().abs() + b.abs())
    terms = terms + (4.0 * h.scale + finite(rounding(h.value, x.dtype))) @ W.t().abs()
    return Expected(h.value @ W.t() + b, finite(terms)), pre, h if save_h else None


def bwd_bound(
    dy: Tensor, weight2: Tensor, saved: Tensor, h: Tensor | None, activation: str,
    need_dpre: bool, need_db1: bool, need_dw2: bool, need_db2: bool,
) -> tuple[Expected | None, ...]:  # fmt: skip
    """dy @ weight2 errs by sqrt(N) sum|dy w|, and h, where it is computed again, is rounded before its product."""
    from ..activations import ACTIVATIONS, activation_backward

    (N, H), M = weight2.shape, math.prod(dy.shape[:-1])
    D, W2 = dy.double().reshape(M, N), weight2.double()
    given = activation != "none" and saved.numel() == M * H  # else nothing that is needed reads it
    S = saved.double().reshape(M, H) if given else D.new_zeros((M, H))
    stored = h is not None
    hidden = ACTIVATIONS[activation](S) if h is None else h.double().reshape(M, H)
    dh = D @ W2
    dpre = activation_backward(dh, S, activation)
    steep = finite(S.abs())  # at an infinite pre-activation the derivative is a constant, or the result no number
    size = finite(4.0 * dh.abs() * (1.0 + steep) + (1.2 + 2.0 * steep) * max(N, 1) ** 0.5 * (D.abs() @ W2.abs()))
    h_terms = M**0.5 * hidden.abs() if stored else M**0.5 * (hidden.abs() + S.abs()) + finite(rounding(hidden, dy.dtype))
    shape = (*dy.shape[:-1], H)
    return (
        Expected(dpre.reshape(shape), size.reshape(shape)) if need_dpre else None,
        Expected(dpre.sum(0), max(M, 1) ** 0.5 * size.sum(0)) if need_db1 else None,
        Expected(D.t() @ hidden, finite(D.abs().t() @ h_terms)) if need_dw2 else None,
        Expected(D.sum(0), finite(M**0.5 * D.abs().sum(0))) if need_db2 else None,
    )


_SHAPES = {  # (M, H, K); the output is K wide
    "gpt2": (8192, 3072, 768),
    "bert_large": (16384, 4096, 1024),
    "llama3_8b": (8192, 14336, 4096),
}


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = "gelu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    M, H, K = shape
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight1 = torch.randn(H, K, device=device, dtype=dtype) * K**-0.5
    weight2 = torch.randn(K, H, device=device, dtype=dtype) * H**-0.5
    bias1, bias2 = torch.randn(H, device=device, dtype=dtype), torch.randn(K, device=device, dtype=dtype)
    return (x, weight1, bias1, weight2, bias2, variant), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, H, K = case.shape
    item = case.dtype.itemsize
    weights = 2 * H * K + H + K
    return (2 * M * K + weights) * item, (3 * M * K + 2 * weights + M * H) * item  # read: dy, x, the pre-activation


def _flops(case: Case) -> tuple[int, int]:
    M, H, K = case.shape
    return 4 * M * H * K, 8 * M * H * K


def _eager(*args: Any, **kwargs: Any) -> Tensor:
    from ..mlp_reference import mlp_eager

    return mlp_eager(*args, **kwargs)


BENCH = Bench(
    make=_make,
    shapes=_SHAPES,
    dtypes=(torch.bfloat16, torch.float16),
    variants=("gelu", "gelu_tanh"),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": _eager},
    headline=(Headline(9, ("gpt2_gelu_tanh",), ("fwd", "fwd+bwd")),),
)


def audit(device: str) -> Iterator[Sample]:
    """Shapes that take every tile of the product with the activation's derivative; a hidden layer that is computed again."""

    def call(layout: str, M: int, H: int, N: int, activation: str, biases: bool = True, **kw: Any) -> Sample:
        x, w1, w2 = (operand(*shape, layout, device, torch.bfloat16) for shape in ((M, 768), (H, 768), (N, H)))
        b1, b2 = (
            empty(w.shape[0], device=device, dtype=w.dtype, start=int(layout == "odd")) if biases else None for w in (w1, w2)
        )
        return Sample(layout, (x, w1, b1, w2, b2, activation), kw)

    shapes = (
        (16, 14336, 4096),
        (64, 14336, 4096),
        (128, 1024, 4096),
        (256, 1024, 4096),
        (512, 2048, 768),
        (8192, 4096, 4096),
        (16384, 3072, 768),
    )
    for layout, activation in (("", "gelu"), ("", "gelu_tanh"), ("odd", "gelu"), ("odd sizes", "gelu")):
        for shape in shapes:
            yield call(layout, *shape, activation)
    yield call("", 16384, 3072, 768, "gelu", biases=False)
    yield call("", 16384, 3072, 768, "gelu", recompute=True)
