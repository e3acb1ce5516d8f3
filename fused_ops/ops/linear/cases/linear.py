"""Linear with bias and activation: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Roles, Sample
from ...case_builders import INFERENCE, cross, empty, randn, tagged
from .matmul import finite, operand, rounding

_NAMES = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "relu2")


@tagged(
    "gelu",
    addressing=("descriptors", "long_k", "sliced", "transposed", "gelu", "silu"),
    rough=("relu", "relu2"),
    first=(
        "relu", "gelu", "bare", "mnk(65, 130, 70)", "mnk(5, 4, 0)", "descriptors", "transposed", "weight_t", "special_gelu_tanh",
    ),
)  # fmt: skip
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Every activation, sizes that are no multiples of a tile, any rank, every layout."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    def case(name: str, x: Tensor, N: int, activation: str | None = None, bias: bool = True) -> Sample:
        K = x.shape[-1]
        return Sample(name, (x, r(N, K, seed=1, scale=max(K, 1) ** -0.5), r(N, seed=2) if bias else None, activation))

    for activation in (None, *_NAMES):
        yield case(f"{activation}", r(19, 33, scale=2.0), 21, activation)
    yield case("no_bias", r(19, 33), 21, "gelu", bias=False)
    yield case("bare", r(19, 33), 21, None, bias=False)
    for M, N, K in ((1, 1, 1), (1, 7, 100), (65, 130, 70), (129, 67, 31), (0, 5, 4), (5, 0, 4), (5, 4, 0)):
        yield case(f"mnk({M}, {N}, {K})", r(M, K), N, "gelu")
    yield case("1d", r(33), 5, "silu")
    yield case("4d", r(2, 3, 4, 33), 5, "silu")
    yield case("long_k", r(3, 1031), 5, None)  # K in parts, the last one short
    yield case("descriptors", r(72, 40), 24, "gelu")  # on Hopper: aligned for TMA, tiles that overhang
    yield case("transposed", r(33, 19).t(), 21, "gelu")
    yield case("sliced", r(38, 80)[::2, 1:66], 21, "gelu")
    yield case("expanded", r(1, 33).expand(6, 33), 21, "gelu")
    x = r(19, 33)
    yield Sample("weight_t", (x, r(33, 21, seed=1).t(), r(21, seed=2), "relu"))
    yield Sample("weight_sliced", (x, r(42, 70, seed=1)[::2, 1:67:2], r(42, seed=2)[::2], "relu"))
    yield Sample("bias_1", (x, r(21, 33, seed=1), r(1, seed=2), "relu"))
    yield Sample("weight_1d", (x, r(33, seed=1), None, None))
    special = r(6, 8)
    special[0, 0], special[1, 1], special[2, 2] = float("nan"), float("inf"), -float("inf")
    for activation in ("relu", "gelu", "gelu_tanh", "silu", "tanh"):
        yield Sample(f"special_{activation}", (special, torch.eye(8, device=device, dtype=dtype), None, activation))


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x, w = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device)

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("activation", (x, w, None, "swish"), r"activation: got 'swish', allowed: None, 'relu'")
    yield refused("k", (x, w[:, :3]), r"input: got shape \(3, 4\).*allowed: last dimension K = 3")
    yield refused("bias", (x, w, x[0]), r"bias: got shape \(4,\), allowed: shape \(5,\)")
    yield refused("weight_rank", (x, w[None]), r"weight: got shape \(1, 5, 4\), allowed: shape \(N, K\)")
    yield refused("dtype", (x, w.half()), r"weight: got torch\.float16, allowed: the dtype of input")
    yield refused("integers", (x.int(), w.int()), r"input: got torch\.int32")
    yield refused("device", (x, torch.zeros(5, 4, device="meta")), r"weight: got a tensor on meta")
    yield refused("not_a_tensor", (x, None), r"weight: got NoneType", TypeError)


def sums(x: Any, weight: Any, bias: Any, activation: str, save_pre: bool) -> bool:
    """Whether the forward of parts of K sums to the whole: with no activation on the sum."""
    return activation == "none"


def bwd_roles(dy: Any, x: Any, weight: Any, *rest: Any) -> Roles:
    """Without a weight the backward is the activation's step alone: x stands for what has y's shape, and dx is dpre."""
    if weight is None:
        return Roles("y y - y - - - -", "y5 w6 b7")
    return Roles("y x w y - - - -", "x5 w6 b7", sums=lambda *_: True)


def fwd_bound(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool) -> tuple[Expected | None, ...]:
    """pre errs by sqrt(K) sum|x w|; the activation passes it on by its slope and adds ulps of its own."""
    from ..activations import ACTIVATIONS

    X, W = x.double(), weight.double()
    b = torch.zeros(weight.shape[0], dtype=torch.float64, device=x.device) if bias is None else bias.double()
    pre = X @ W.t() + b
    terms = max(x.shape[-1], 1) ** 0.5 * (X.abs() @ W.t().abs() + b.abs())
    slope = 2.0 * pre.abs() if activation == "relu2" else 1.2
    y = ACTIVATIONS[activation](pre)
    spread = finite(slope * terms + pre.abs()) + finite(2.0 * y.abs())  # tanh is 1 - 2 / (1 + e): ulps of 2
    return Expected(y, spread), (Expected(pre, finite(terms)) if save_pre else None)


def bwd_bound(
    dy: Tensor, x: Tensor, weight: Tensor | None, saved: Tensor, activation: str, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Expected | None, ...]:
    """dpre is rounded to x's dtype before the two products: half the spacing of each of its terms is allowed."""
    from ..activations import activation_backward

    N, K = (dy.shape[-1],) * 2 if weight is None else weight.shape
    G = dy.double().reshape(math.prod(dy.shape[:-1]), N)
    S = G.new_zeros(()) if activation == "none" else saved.double().reshape(G.shape)
    dpre = activation_backward(G, S, activation)
    moved = torch.zeros_like(dpre) if activation == "none" else finite(rounding(dpre, dy.dtype))
    size = finite(dpre.abs() + 4.0 * G.abs() * (1.0 + finite(S.abs())))
    X = x.double().reshape(G.shape[0], K) if need_dw else G.new_zeros((G.shape[0], K))
    db = Expected(dpre.sum(0), G.shape[0] ** 0.5 * size.sum(0)) if need_db else None
    if weight is None:
        return Expected(dpre.reshape(dy.shape), size.reshape(dy.shape)) if need_dx else None, None, db
    W = weight.double()
    dx_terms = N**0.5 * (size @ W.abs()) + moved @ W.abs()
    dw_terms = G.shape[0] ** 0.5 * (size.t() @ X.abs()) + moved.t() @ X.abs()
    return (
        Expected((dpre @ W).reshape((*dy.shape[:-1], K)), finite(dx_terms).reshape((*dy.shape[:-1], K))) if need_dx else None,
        Expected(dpre.t() @ X, finite(dw_terms)) if need_dw else None,
        db,
    )


_SHAPES = {  # (M, N, K)
    "bert_base_fc1": (16384, 3072, 768),
    "bert_large_fc1": (16384, 4096, 1024),
    "gpt2_fc1": (8192, 3072, 768),
    "vit_large_fc1": (12608, 4096, 1024),
    "llama3_8b": (8192, 14336, 4096),
    "llama3_70b": (8192, 28672, 8192),
    "decode_1": (1, 14336, 4096),
    "decode_16": (16, 14336, 4096),
    "decode_64": (64, 14336, 4096),
    "decode_256": (256, 14336, 4096),
    "latency_140": (140, 4096, 4096),
    "latency_256": (256, 1024, 1024),
}


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = "gelu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    M, N, K = shape
    x = torch.randn(M, K, device=device, dtype=dtype)
    w = torch.randn(N, K, device=device, dtype=dtype) * K**-0.5
    return (x, w, torch.randn(N, device=device, dtype=dtype), variant), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    item = case.dtype.itemsize
    saved = 0 if case.name.endswith("_None") else M * N  # the pre-activation, which the backward reads beside dy
    return (M * K + N * K + N + M * N) * item, (2 * M * K + 2 * N * K + N + M * N + saved) * item


def _flops(case: Case) -> tuple[int, int]:
    M, N, K = case.shape
    return 2 * M * N * K, 4 * M * N * K


def _eager(*args: Any) -> Tensor:
    from ..linear_reference import linear_eager

    return linear_eager(*args)


BENCH = Bench(
    make=_make,
    shapes=_SHAPES,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    variants=(None, "gelu", "gelu_tanh", "silu"),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": _eager},
    headline=(
        Headline(3, ("bert_base_fc1_gelu", "bert_base_fc1_gelu_tanh"), ("fwd", "train_fwd", "bwd")),
        Headline(6, ("latency_140_gelu",), ("fwd:wall",)),
        Headline(7, ("llama3_8b_silu", "llama3_8b_gelu_tanh"), ("fwd", "bwd")),
        Headline(15, ("decode_1_silu", "decode_16_gelu"), ("fwd",)),
        Headline(16, ("bert_base_fc1_silu", "llama3_8b_gelu"), ("fwd",)),
        Headline(19, ("latency_256_gelu",), ("fwd:wall",)),
    ),
)


def audit(device: str) -> Iterator[Sample]:
    """Shapes that take every tile, with erf's gelu; then the largest with other activations, and what surrounds fp32 products."""

    def call(layout: str, M: int, N: int, K: int, activation: str | None, dtype: torch.dtype = torch.bfloat16) -> Sample:
        x, w = (operand(rows, K, layout, device, dtype) for rows in (M, N))
        bias = empty(w.shape[0], device=device, dtype=dtype, start=int(layout == "odd"))
        return Sample(layout, (x, w, bias, activation))

    shapes = ((16, 14336, 4096), (32, 14336, 4096), (64, 14336, 4096), (64, 4096, 256), (128, 1024, 4096), (256, 1024, 4096), (512, 2048, 1024),
              (2048, 1024, 4096), (8192, 4096, 4096), (16384, 3072, 768))  # fmt: skip
    for layout, (M, N, K) in [*cross(("", "odd", "odd sizes"), shapes), *cross(("transposed",), shapes[3:])]:
        yield call(layout, M, N, K, "gelu")
    for M, N, K in (shapes[0], shapes[4], shapes[-1]):
        yield dataclasses.replace(call("", M, N, K, "gelu"), name=INFERENCE)
    for activation, dtype in cross(("gelu", "gelu_tanh", "tanh", None), (torch.bfloat16, torch.float32)):
        yield call("", 16384, 3072, 768, activation, dtype)
    yield call("", 16384, 3072, 768, "gelu", torch.float16)
    x, w = operand(16384, 768, "", device, torch.bfloat16), operand(3072, 768, "", device, torch.bfloat16)
    yield Sample("frozen weight", (x.requires_grad_(), w, None, "gelu"))
