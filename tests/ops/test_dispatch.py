"""Where a library's product takes the place of ours: by one table, within the same contract of values, shapes and strides."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops._tools.forecast import gpu_named
from fused_ops.kernels.linear.linear_config import linear_config
from fused_ops.ops.linear import dispatch, linear_fp8_launch, linear_launch, linear_plan, matmul_plan
from fused_ops.ops.linear.cases.linear_fp8 import quantise
from fused_ops.ops.linear.linear_fp8_reference import linear_fp8_reference

HALVES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches plan as for tensors on a Hopper GPU, and what is planned runs on CPU tensors."""
    plan = linear_plan.linear_plan

    def as_on_a_gpu(key: Any, *args: Any) -> Any:
        return plan(matmul_plan.Operands(*key)._replace(cuda=True), *args)

    for module in (linear_launch, linear_fp8_launch):
        monkeypatch.setattr(module, "linear_plan", as_on_a_gpu)


def backend(activation: str, dtype: torch.dtype, save_pre: bool = False, M: int = 512, N: int = 256, bias: bool = True) -> str:
    x, w = torch.zeros(M, 128, dtype=dtype), torch.zeros(N, 128, dtype=dtype)
    found, *_ = linear_launch.plan_of(x, w, torch.zeros(N, dtype=dtype) if bias else None, activation, save_pre)
    assert found.reason
    return found.backend


@pytest.mark.usefixtures("gpu")
def test_what_computes_a_linear() -> None:
    for activation in ("none", "gelu", "gelu_tanh", "silu"):
        assert backend(activation, torch.float32) == backend(activation, torch.float32, True) == "cublas"
    for dtype in HALVES:
        assert backend("none", dtype) == "cublas"
        assert {backend(name, dtype) for name in ("gelu", "silu", "tanh", "relu")} == {"triton"}
        assert backend("gelu_tanh", dtype, save_pre=True) == "triton"
    assert backend("gelu_tanh", torch.bfloat16) == "cublaslt"
    assert backend("gelu_tanh", torch.float16) == "triton"
    assert backend("gelu_tanh", torch.bfloat16, M=64) == backend("gelu_tanh", torch.bfloat16, bias=False) == "triton"
    assert backend("gelu_tanh", torch.bfloat16, N=250) == "triton"


def test_a_cpu_and_a_forced_configuration_are_not_asked() -> None:
    assert backend("gelu_tanh", torch.bfloat16) == "triton"
    o = matmul_plan.Operands(
        *matmul_plan.operands(torch.zeros(512, 64).bfloat16(), 512, (64, 1), torch.zeros(64, 64).bfloat16())
    )
    with matmul_plan.forced_config(linear_config(512, 64, 64, 2, (9, 0), 132, "aligned")):
        found = linear_plan.linear_plan(o._replace(cuda=True), 1, torch.bfloat16, torch.bfloat16, "gelu_tanh", False)
    assert found.backend == "triton"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shape", [(80, 48), (4, 20, 48)])
def test_cublaslt_gives_what_the_reference_does(shape: tuple[int, ...]) -> None:
    """On a CPU the activation of this operator is erf's gelu, in another precision: values but to bf16's rounding."""
    x, w, b = torch.randn(shape).bfloat16(), torch.randn(32, 48).bfloat16() / 7, torch.randn(32).bfloat16()
    assert linear_launch.plan_of(x, w, b, "gelu_tanh", False)[0].backend == "cublaslt"
    y, pre = linear_launch.linear_launch(x, w, b, "gelu_tanh", False)
    reference, _ = linear_launch.linear_reference(x, w, b, "gelu_tanh", False)
    assert (y.shape, y.stride(), y.dtype) == (reference.shape, reference.stride(), reference.dtype)
    assert pre.numel() == 0
    torch.testing.assert_close(y, F.gelu(F.linear(x.float(), w.float(), b.float())).bfloat16(), rtol=2e-2, atol=2e-2)


def fp8_call(rows: bool, bias: torch.dtype | None, M: int = 320) -> tuple[Tensor, ...]:
    x, xs = quantise(torch.randn(M, 64), rows)
    w, ws = quantise(torch.randn(48, 64) / 8, rows)
    return x, w, xs, ws, None if bias is None else torch.randn(48).to(bias)  # type: ignore[return-value]


@pytest.mark.usefixtures("gpu")
def test_what_computes_an_fp8_linear() -> None:
    def planned(M: int, activation: str, out: torch.dtype, rows: bool, bias: torch.dtype | None) -> linear_plan.Linear:
        return linear_fp8_launch.plan_of(*fp8_call(rows, bias, M), activation, out)[0]  # type: ignore[arg-type]

    for rows, bias in itertools.product((True, False), (None, torch.bfloat16)):
        found = planned(320, "none", torch.bfloat16, rows, bias)
        assert (found.backend, found.reduce, found.main) == ("scaled_mm", None, None)
        for activation, out, given in (
            ("gelu", torch.bfloat16, bias),
            ("none", torch.float32, bias),
            ("none", torch.bfloat16, torch.float32),
        ):
            found = planned(320, activation, out, rows, given)
            assert (found.backend, found.main) == ("scaled_mm", None)
            assert found.reduce is not None
        assert planned(256, "none", torch.bfloat16, rows, bias).backend == "triton"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rows", [True, False])
def test_scaled_mm_gives_what_the_reference_does(rows: bool, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls computed in fp32, since not every CPU has them; what follows the product, by the formula of linear_reduce_kernel."""
    ran = []

    def product(
        x: Tensor, w: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None = None, out_dtype: Any = None, out: Any = None
    ) -> Tensor:
        assert x.stride(1) == w.stride(0) == 1
        assert xs.is_contiguous()
        assert ws.is_contiguous()
        assert (xs.shape, ws.shape) in (((x.shape[0], 1), (1, w.shape[1])), ((1,), (1,)), ((), ()))
        assert out is None or (out.dtype is out_dtype and out.is_contiguous())
        ran.append("product")
        y = x.float() @ w.float() * xs * ws
        y = (y if bias is None else y + bias).to(out_dtype)
        return y if out is None else out.copy_(y)

    def after(planned: Any, M: int, part: Tensor, b: Tensor, y: Tensor, pre: Tensor, xs: Tensor, ws: Tensor) -> None:
        o = planned.options
        assert part.dtype is torch.float32
        assert (o["N"], o["S"], o["SAVE_PRE"], o["HAS_BIAS"]) == (48, 1, False, True)
        scale = xs.as_strided((M, 1), (o["stride_xs"], 0)) * ws.as_strided((1, 48), (0, o["stride_ws"]))
        total = part * scale + b.float()
        y.copy_(F.gelu(total) if o["ACT"] == "gelu" else total)
        ran.append(o["ACT"])

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(linear_fp8_launch, "scaled_mm_out", product)
    monkeypatch.setattr(linear_fp8_launch, "add_up", after)
    call = fp8_call(rows, torch.bfloat16)
    y = linear_fp8_launch.linear_fp8_launch(*call, activation, torch.bfloat16)  # type: ignore[arg-type]
    reference = linear_fp8_reference(*call, activation, torch.bfloat16)  # type: ignore[arg-type]
    assert ran == (["product"] if activation == "none" else ["product", "gelu"])
    assert (y.stride(), y.dtype) == (reference.stride(), reference.dtype)
    torch.testing.assert_close(y, reference, rtol=1e-2, atol=1e-3)


def test_every_rule_is_of_a_known_use_and_decides_something() -> None:
    for found in dispatch.RULES:
        assert set(found.uses) <= set(dispatch.USES)
        assert found.reason
        names = found.activations or ("none", "gelu")
        majors = found.capabilities or (8, 9)
        calls = itertools.product(found.uses, names, found.dtypes, (max(found.least_rows, 1),), (True,), majors)
        assert all(dispatch.rule(*call) is found for call in calls)
    assert dispatch.rule("train", "gelu", torch.bfloat16, 16384, True, 9) is None
    assert dispatch.rule("dact", "gelu", torch.bfloat16, 16384, True, 9) is None
    assert {torch.float32} == dispatch.CUBLAS_ONLY


# Instructions an element of our epilogues, counted in the SASS of their tiles for sm_90.
EPILOGUES = {
    ("fwd", "gelu"): 24,
    ("train", "gelu"): 26,
    ("fwd", "gelu_tanh"): 15,
    ("train", "silu"): 15,
    ("dact", "gelu"): 38,
    ("fp8", "gelu"): 28,
}
DRAIN = 136  # instructions of a warp for each step of K in which fp8's partial sums join
EPILOGUE_BYTES = {"fwd": 6, "train": 8, "dact": 8, "fp8": 6}  # an element, of a kernel behind an fp32 product, all it moves


def ours_seconds(use: str, activation: str, M: int, N: int, K: int, gpu: Any) -> float:
    """The busiest SM's tiles: main loop and epilogue, one under the other where an SM has two programs."""
    itemsize = 1 if use == "fp8" else 2
    tile = linear_config(M, N, K, itemsize, (9, 0), gpu.sms, "tma", {"train": "fwd"}.get(use, use))
    waves = -(-(-(-M // tile.block_m) * -(-N // tile.block_n)) // gpu.sms)
    slots = 4 * gpu.issue_share * gpu.clock
    speed = 0.95 * (1.0 if tile.block_m * tile.block_n >= 128 * 256 else 0.9)
    main = 2 * tile.block_m * tile.block_n * K * gpu.sms / (gpu.rates[itemsize] * speed)
    main += DRAIN * tile.num_warps * (K / tile.block_k) / slots if use == "fp8" else 0.0
    epilogue = tile.block_m * tile.block_n / 32 * EPILOGUES[use, activation] / slots
    together = max(main, epilogue) + gpu.latency / 2 if tile.programs > 1 else main + epilogue + gpu.latency
    return float(waves * together + gpu.launch)


def library_seconds(use: str, M: int, N: int, K: int, gpu: Any, epilogue: bool = True) -> float:
    """A library's product; then, where it has no epilogue, one kernel on it in fp32, so that it is rounded once."""
    product = 2 * M * N * K / (gpu.rates[1 if use == "fp8" else 2] * 0.97) + gpu.launch
    return float(product + (M * N * EPILOGUE_BYTES[use] / gpu.copy + gpu.launch if epilogue else 0.0))


SHAPES = (
    (16384, 3072, 768),
    (16384, 4096, 1024),
    (8192, 3072, 768),
    (12608, 4096, 1024),
    (16384, 4096, 2048),
    (8192, 14336, 4096),
)


@pytest.mark.parametrize(("use", "activation"), EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_agrees_with_the_forecast(shape: tuple[int, int, int], use: str, activation: str) -> None:
    """A library computes where, and only where, ours is forecast to lose more than a tenth to it on an H100 or an H200."""
    dtype = FP8 if use == "fp8" else torch.bfloat16
    found = dispatch.rule(use, activation, dtype, shape[0], True, 9)
    apart = found is None or found.backend != "cublaslt"
    gpus = [gpu_named(name) for name in ("h100", "h200")]
    ratios = [ours_seconds(use, activation, *shape, gpu) / library_seconds(use, *shape, gpu, apart) for gpu in gpus]
    assert (found is not None) == (max(ratios) > 1.1), ratios
