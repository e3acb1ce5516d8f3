"""Layer norm: samples, errors, contract bound, bench and audit cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...._torch.spec import Bench, Case, ErrorSample, Expected, Headline, Sample
from ...case_builders import INFERENCE, cross, empty, randn, tagged


@tagged(
    "rows(37, 63)",
    addressing=("long_row", "wide_bwd", "sliced", "offset_view", "transposed", "rows(37, 63)", "rows(9, 257)"),
    rough=("eps_negative",),
    first=(
        "rows(2, 1000)", "rows(0, 5)", "no_affine", "no_bias", "transposed", "offset_view", "expanded", "mean_300", "special",
    ),
    slow=("long_row", "wide_bwd"),
)  # fmt: skip
def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Shapes that are no powers of two, any normalized_shape, absent parameters, every layout, hard values."""

    def r(*shape: int, **kw: Any) -> Tensor:
        return randn(*shape, device=device, dtype=dtype, **kw)

    def case(name: str, x: Tensor, n: int, weight: bool = True, bias: bool = True, eps: float = 1e-5) -> Sample:
        w = r(n, seed=1) if weight else None
        return Sample(name, (x, (n,), w, r(n, seed=2) if bias else None, eps))

    for M, N in ((1, 1), (3, 1), (1, 7), (37, 63), (9, 257), (2, 1000), (7, 384), (33, 128), (3, 2049), (0, 5), (5, 0)):
        yield case(f"rows({M}, {N})", r(M, N), N)
    yield case("no_weight", r(6, 65), 65, weight=False)
    yield case("no_bias", r(6, 65), 65, bias=False)
    yield case("no_affine", r(6, 65), 65, weight=False, bias=False)
    yield case("1d", r(19), 19)
    yield case("4d", r(2, 3, 5, 21), 21)
    yield Sample("shape2", (r(4, 5, 6), (5, 6), r(5, 6, seed=1), r(5, 6, seed=2)))
    yield Sample("shape3", (r(3, 5, 6), (3, 5, 6), r(3, 5, 6, seed=1), None))
    yield Sample("shape2_empty", (r(65, 1, 0), (1, 0), r(1, 0), r(1, 0)))
    yield case("long_row", r(2, 40001, scale=3.0, offset=1.0), 40001)
    yield case("wide_bwd", r(19, 8200), 8200)  # chunked, and more tiles of rows than programs
    yield case("transposed", r(33, 9).t(), 33)
    yield case("sliced", r(12, 80)[::2, 1:66], 65)
    yield case("offset_view", r(4 * 40 + 1)[1:].view(4, 40), 40)
    yield case("permuted", r(5, 4, 33).transpose(0, 1), 33)
    yield case("expanded", r(1, 21).expand(6, 21), 21)
    yield case("mean_300", r(6, 129, offset=300.0), 129)
    yield case("tiny_spread", r(6, 129, scale=1e-3), 129)
    yield case("eps_large", r(6, 129), 129, eps=0.5)
    yield case("eps_negative", r(3, 17, scale=1e-2), 17, eps=-1.0)
    special = r(5, 40)
    special[0, 3] = float("nan")
    special[1, 3] = float("inf")
    special[2] = 4.0
    yield case("special", special, 40)
    if dtype in (torch.float16, torch.bfloat16):
        wide = [randn(65, device=device, dtype=torch.float32, seed=s) for s in (1, 2)]
        yield Sample("fp32_weight", (r(6, 65), (65,), *wide))


NOT_SHAPES: dict[str, Any] = {
    "float": 4.0, "floats": [4.0], "bool": True, "bools": [True], "None": None, "Nones": [None], "str": "4", "strs": ["4"],
    "weight": torch.ones(4096), "int_tensor": torch.tensor([4]), "float_tensors": [torch.tensor(4.0)], "range": range(4, 5),
}  # fmt: skip
NOT_NUMBERS: dict[str, Any] = {
    "str": "1e-5", "complex": 1j, "list": [1e-5], "tensor_1d": torch.tensor([1e-5]),
    "gradient": torch.tensor(1e-5, requires_grad=True),
}  # fmt: skip


def errors(device: str) -> Iterator[ErrorSample]:
    """Calls that must be refused."""
    x = torch.zeros(3, 4, device=device)
    w = torch.ones(4, device=device)

    def refused(name: str, args: tuple[Any, ...], match: str, raises: type[Exception] = RuntimeError) -> ErrorSample:
        return ErrorSample(name, args, {}, raises, match)

    yield refused("shape", (x, (5,)), r"normalized_shape: got \(5,\) with input of shape \(3, 4\)")
    yield refused("shape_rank", (x, (2, 3, 4)), r"normalized_shape: got \(2, 3, 4\)")
    yield refused("shape_empty", (x, ()), r"normalized_shape: got \(\), allowed: at least one")
    for name, given in NOT_SHAPES.items():
        yield refused(f"shape_{name}", (x, given), r"normalized_shape: got ", TypeError)
    for name, eps in NOT_NUMBERS.items():
        yield refused(f"eps_{name}", (x, (4,), w, None, eps), r"eps: got ", TypeError)
    yield refused("eps_None", (x, (4,), w, w, None), r"eps: got None", TypeError)
    yield refused("weight", (x, (4,), w[:3]), r"weight: got shape \(3,\), allowed: shape \(4,\)")
    yield refused("bias", (x, (4,), w, w[None]), r"bias: got shape \(1, 4\), allowed: shape \(4,\)")
    yield refused("integers", (x.int(), (4,)), r"input: got torch\.int32")
    yield refused("int_weight", (x, (4,), w.int()), r"weight: got torch\.int32")
    yield refused("not_a_tensor", ("x", (4,)), r"input: got str", TypeError)
    yield refused("device", (x, (4,), torch.ones(4, device="meta")), r"weight: got a tensor on meta")


def fwd_bound(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Expected, ...]:
    """The mean errs by sqrt(N) mean|x|, rstd by sqrt(N) (1 + mean|x| rstd) relatively, and y by both."""
    X = x.double()
    N = x.shape[-1]
    if N == 0:  # nothing reads the statistics of no numbers
        zeros = X.new_zeros(x.shape[:-1])
        return Expected(X, X), Expected(zeros, zeros + torch.inf), Expected(zeros, zeros + torch.inf)
    w = torch.ones(N, dtype=torch.float64, device=x.device) if weight is None else weight.double()
    b = torch.zeros(N, dtype=torch.float64, device=x.device) if bias is None else bias.double()
    mean = X.mean(-1, keepdim=True)
    var = (X - mean).square().mean(-1, keepdim=True)
    rstd = 1.0 / torch.sqrt(var + eps)
    x_hat = (X - mean) * rstd
    size = X.abs().mean(-1, keepdim=True)
    unsure = 1.0 + size * rstd
    spread = N**0.5 * (w.abs() * rstd * (X.abs() + size) + (w * x_hat).abs() * unsure + b.abs())
    return (
        Expected(x_hat * w + b, spread),
        Expected(mean[..., 0], N**0.5 * size[..., 0]),
        Expected(rstd[..., 0], N**0.5 * (rstd * unsure)[..., 0]),
    )


def bwd_bound(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    need_dx: bool, need_dw: bool, need_db: bool, bias_dtype: torch.dtype | None,
) -> tuple[Expected | None, ...]:  # fmt: skip
    """For the given mean and rstd; x_hat's error is that of x - mean, whose terms are |x| and |mean|."""
    X, G = x.double(), dy.double()
    m, s = mean.double()[..., None], rstd.double()[..., None]
    N = x.shape[-1]
    g = G if weight is None else G * weight.double()
    x_hat, terms = (X - m) * s, (X.abs() + m.abs()) * s.abs()
    gx = (g * x_hat).mean(-1, keepdim=True)
    dx = s * (g - g.mean(-1, keepdim=True) - x_hat * gx)
    size = g.abs() + g.abs().mean(-1, keepdim=True) + terms * (g.abs() * terms).mean(-1, keepdim=True)
    shape = (mean.numel(), N)
    flat, flat_terms = G.reshape(shape), (G.abs() * terms).reshape(shape)
    rows = max(flat.shape[0], 1) ** 0.5
    dw_rows, db_rows = rows * coarse(x, None if weight is None else weight.dtype), rows * coarse(x, bias_dtype)
    return (
        Expected(dx, N**0.5 * s.abs() * size) if need_dx else None,
        Expected((G * x_hat).reshape(shape).sum(0), dw_rows * flat_terms.sum(0)) if need_dw else None,
        Expected(flat.sum(0), db_rows * flat.abs().sum(0)) if need_db else None,
    )


def coarse(x: Tensor, dtype: torch.dtype | None) -> float:
    """How many times coarser than a computation in fp64 the gradient of an fp64 parameter is: it is computed in fp32 but for fp64 x."""
    return 2.0**29 if dtype is torch.float64 and x.dtype is not torch.float64 else 1.0


_SHAPES = (
    (16384, 768), (8192, 1024), (8192, 1600), (8192, 4096), (8192, 8192), (4096, 16384), (2048, 32768), (2048, 65536),
    (65536, 16384), (131072, 16384), (140, 4096), (256, 1024), (1, 4096),
)  # fmt: skip


def _make(device: str, shape: Any, dtype: torch.dtype, variant: str | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    w, b = torch.randn(2, shape[1], device=device, dtype=dtype)
    return (torch.randn(shape, device=device, dtype=dtype), (shape[1],), w, b), {}


def _bytes(case: Case) -> tuple[int, int]:
    M, N = case.shape
    item = case.dtype.itemsize
    return (2 * M * N + 2 * N) * item + 8 * M, (3 * M * N + 3 * N) * item + 8 * M


def _flops(case: Case) -> tuple[int, int]:
    elements = case.shape[0] * case.shape[1]
    return 8 * elements, 14 * elements


BENCH = Bench(
    make=_make,
    shapes={f"{M}x{N}": (M, N) for M, N in _SHAPES},
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    bytes=_bytes,
    flops=_flops,
    baselines={"eager": F.layer_norm},
    headline=(
        Headline(2, ("8192x4096", "16384x768", "4096x16384"), ("fwd", "bwd")),
        Headline(5, ("140x4096",), ("fwd:wall", "fwd+bwd:wall")),
        Headline(12, ("8192x1024", "8192x8192", "2048x32768"), ("fwd", "bwd")),
        Headline(14, ("2048x65536",), ("fwd", "bwd")),
        Headline(18, ("256x1024", "1x4096"), ("fwd:wall",)),
    ),
)


def audit(device: str) -> Iterator[Sample]:
    """Each row length at which a configuration changes, many rows and few, then parameters, addresses and strides."""

    def call(tag: str, x: Tensor, affine: bool = True, dtype: torch.dtype | None = None) -> Sample:
        N = x.shape[-1]
        w, b = (empty(N, device=device, dtype=dtype or x.dtype) if affine else None for _ in range(2))
        return Sample(tag, (x, (N,), w, b))

    def x(M: int, N: int, dtype: torch.dtype = torch.bfloat16, start: int = 0) -> Tensor:
        return empty(M, N, device=device, dtype=dtype, start=start)

    for N, dtype in cross((*_AUDIT_WHOLE, *_AUDIT_ODD), (torch.bfloat16, torch.float32)):
        yield call("", x(65536, N, dtype))
    for N, dtype in cross(_AUDIT_ODD, (torch.bfloat16, torch.float32)):
        yield call("", x(65536, N, dtype), affine=False)  # without w and b, for which the width of loads is judged
    for N in (64, 197, 256, 512):
        yield call("few rows", x(33, N))
    for N in (1001, 4096, 8192, 16384, 32768, 65536, 128256):
        yield call(INFERENCE, x(65536, N))
    yield call("", x(65536, 4096, torch.float16))
    yield call("", x(65536, 4096), affine=False)
    for affine, N in ((True, 12288), (False, 16384)):  # in shared memory
        yield call("", x(65536, N), affine)
    yield call("fp32 parameters", x(65536, 4096), dtype=torch.float32)
    yield call("odd address", x(65536, 4096, start=1))
    yield call("padded rows", x(65536, 1008)[:, :1000])
    yield call("padded to an odd stride", x(65536, 1001)[:, :1000])
    yield call("transposed", x(1000, 65536).t())
    yield call("frozen parameters", x(65536, 4096).requires_grad_())


_AUDIT_WHOLE = (64, 256, 512, 768, 1000, 1024, 1600, 4096, 8192, 16384, 32768, 65536, 131072, 128256, 256000)
_AUDIT_ODD = (197, 1001, 1023, 4097, 8191, 50257)
