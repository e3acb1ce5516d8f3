"""Every variant of the matmul kernels, forced by its configuration and held to the numerics contract in the interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_gated_linear, fused_linear, fused_linear_fp8, fused_mlp
from fused_ops._runtime import scratch
from fused_ops.kernels.config import MatmulConfig
from fused_ops.ops.linear import matmul, matmul_plan
from fused_ops.ops.linear.matmul_plan import forced_config, kernels
from fused_ops.testing import ContractMode, watch_launches

TMA = MatmulConfig(32, 32, 32, num_warps=4, num_stages=2, group_m=2, kind="tma")
POINTER = MatmulConfig(32, 32, 32, num_warps=4, num_stages=2, group_m=2)
SPLIT_K = MatmulConfig(16, 32, 16, num_warps=4, num_stages=2, kind="split_k", splits=3)
CONFIGS = {
    "tma": TMA,
    "tma_2_subtiles": dataclasses.replace(TMA, subtiles=2),
    "tma_4_subtiles": dataclasses.replace(TMA, subtiles=4, block_n=64),
    "tma_warp_specialized": dataclasses.replace(TMA, warp_specialize=True),
    "pointer": POINTER,
    "split_k": SPLIT_K,
}
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []

    def spy(kernel: Any, *_: Any) -> bool:
        names.append(kernel.__name__)
        return False

    watch_launches(spy)
    return names


def _x(M: int, K: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    x = torch.randn(K, M).to(dtype).t() if transposed else torch.randn(M, K).to(dtype)
    return x.detach().requires_grad_()


def _w(N: int, K: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return (_x(N, K, dtype, transposed).detach() * K**-0.5).detach().requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("poisoned_memory")
def test_linear(ran: list[str], name: str, dtype: torch.dtype) -> None:
    """Tiles that overhang in M, N and K, bands of several tile rows, the pre-activation stored."""
    config = CONFIGS[name]
    x, w, b = _x(72, 40, dtype), _w(88, 40, dtype), _x(1, 88, dtype).detach()[0]
    with forced_config(config), ContractMode() as mode:
        fused_linear(x, w, b, "gelu").detach()
        with torch.no_grad():
            fused_linear(x, w, None, "silu")
    assert len(mode.checked) == 2
    expected = {"tma": {"linear_fwd_tma_kernel"}, "pointer": {"linear_fwd_kernel"}}
    assert set(ran) == expected.get(config.kind, {"linear_split_k_kernel", "linear_reduce_kernel"})


@pytest.mark.parametrize(("x_t", "w_t"), [(True, False), (False, True), (True, True)])
def test_tma_reads_transposed_operands(ran: list[str], x_t: bool, w_t: bool) -> None:
    x, w = _x(72, 40, torch.float16, x_t), _w(88, 40, torch.float16, w_t)
    with forced_config(TMA), ContractMode() as mode:
        fused_linear(x.detach(), w.detach(), None, "relu")
    assert mode.checked
    assert set(ran) == {"linear_fwd_tma_kernel"}


@pytest.mark.parametrize(
    "case", ["begins at no 16-byte boundary", "rows at no 16-byte boundary", "no stride of 1", "odd N", "expanded rows"]
)
def test_what_tma_cannot_describe_goes_to_the_pointer_kernel(ran: list[str], case: str) -> None:
    x = {
        "begins at no 16-byte boundary": torch.randn(72, 48).half()[:, 1:41],
        "rows at no 16-byte boundary": torch.randn(72, 41).half()[:, :40],
        "no stride of 1": torch.randn(72, 80).half()[:, ::2],
        "odd N": torch.randn(72, 40).half(),
        "expanded rows": torch.randn(1, 40).half().expand(72, 40),
    }[case]
    w = torch.randn(87 if case == "odd N" else 88, 40).half()
    with forced_config(TMA), ContractMode() as mode:
        fused_linear(x, w, None, "gelu")
    assert mode.checked
    assert set(ran) == {"linear_fwd_kernel"}


@pytest.mark.parametrize("name", ["tma_2_subtiles", "pointer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_gated_linear(ran: list[str], name: str, dtype: torch.dtype) -> None:
    x, w_gate, w_up = _x(40, 40, dtype), _w(56, 40, dtype), _w(56, 40, dtype)
    b_gate, b_up = (torch.randn(56).to(dtype).requires_grad_() for _ in range(2))
    with forced_config(CONFIGS[name]), ContractMode() as mode:
        y = fused_gated_linear(x, w_gate, w_up, "silu", b_gate, b_up)
        y.backward(torch.randn(56, 40).to(dtype).t())
    assert len(mode.checked) == 2
    tma = "_tma" if CONFIGS[name].kind == "tma" else ""
    assert {f"gated_linear_fwd{tma}_kernel", "gate_bwd_kernel", f"product_sum{tma}_kernel"} <= set(ran)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["tma_2_subtiles", "tma_4_subtiles", "pointer"])
@pytest.mark.usefixtures("poisoned_memory")
def test_mlp(ran: list[str], name: str, recompute: bool) -> None:
    dtype = torch.bfloat16
    x, w1, w2 = _x(40, 24, dtype), _w(72, 24, dtype), _w(40, 72, dtype)
    b1, b2 = (torch.randn(n).to(dtype).requires_grad_() for n in (72, 40))
    with forced_config(CONFIGS[name]), ContractMode() as mode:
        fused_mlp(x, w1, b1, w2, b2, "gelu", recompute=recompute).backward(torch.randn(40, 40).to(dtype))
    assert [name.split(".")[1] for name in mode.checked] == ["mlp_fwd", "mlp_bwd", "linear_bwd"]
    assert ("linear_reduce_kernel" in ran) == recompute  # the activation again, from what was kept
    assert f"linear_dact{'_tma' if CONFIGS[name].kind == 'tma' else ''}_kernel" in ran


@pytest.mark.parametrize("needs", [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)])
def test_mlp_computes_only_needed_gradients(ran: list[str], needs: tuple[int, ...]) -> None:
    tensors = [torch.randn(s, dtype=torch.float16) for s in ((6, 8), (16, 8), (16,), (8, 16), (8,))]
    for tensor, need in zip(tensors, needs):
        tensor.requires_grad_(bool(need))
    with ContractMode() as mode:
        fused_mlp(*tensors, "gelu", recompute=True).sum().backward()
    assert [name.split(".")[1] for name in mode.checked] == ["mlp_fwd", "mlp_bwd", *["linear_bwd"] * any(needs[:2])]
    assert [t.grad is not None for t in tensors] == [bool(n) for n in needs]
    assert ("linear_dact_kernel" in ran) == any(needs[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_samples(dtype: torch.dtype) -> None:
    for sample in REGISTRY["linear_fp8"].samples("cpu", dtype):
        with ContractMode() as mode:
            fused_linear_fp8(*sample.args, **sample.kwargs)
        assert mode.checked == ["fused_ops.linear_fp8_fwd.default"], sample.name


@pytest.mark.parametrize("name", ["tma_2_subtiles", "split_k", "pointer"])
def test_fp8_variants(ran: list[str], name: str) -> None:
    x, w = (torch.randn(n, 48).to(torch.float8_e4m3fn) for n in (40, 56))
    xs, ws, b = torch.rand(40), torch.rand(56), torch.randn(56).bfloat16()
    with forced_config(CONFIGS[name]), ContractMode() as mode:
        fused_linear_fp8(x, w, xs, ws, b, "gelu")
    assert mode.checked
    assert {"tma": "linear_fwd_tma_kernel", "split_k": "linear_split_k_kernel"}.get(
        CONFIGS[name].kind, "linear_fwd_kernel"
    ) in ran


@pytest.mark.parametrize("name", ["tma", "split_k", "pointer"])
def test_long_sums_are_fp32(name: str) -> None:
    """2^15 and 4095 terms that add 256 to it: each tile of 128 adds 8, a quarter of the spacing of fp16 there."""
    config = dataclasses.replace(CONFIGS[name], block_k=128)
    for dtype in DTYPES:
        x = torch.full((8, 4096), 2.0**-4, dtype=dtype)
        x[:, 0], x[:, 1] = 2.0**15, 2.0**-3
        with forced_config(config):
            assert (fused_linear(x, torch.ones(8, 4096, dtype=dtype)) == 2.0**15 + 256).all()


@pytest.mark.parametrize("save_pre", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogue_of_a_product_made_elsewhere(save_pre: bool, with_bias: bool) -> None:
    """What follows cuBLAS for fp32: in place where the pre-activation is not kept."""
    product, bias = torch.randn(37, 29), torch.randn(58)[::2] if with_bias else None
    pre = product + bias if bias is not None else product.clone()
    y = torch.full_like(product, float("nan")) if save_pre else product
    matmul.matmul_epilogue(product, bias, y, "gelu")
    torch.testing.assert_close(y, torch.nn.functional.gelu(pre))
    if save_pre:
        torch.testing.assert_close(product, pre)


def test_natural_choices(ran: list[str]) -> None:
    """Without force: Hopper's choice for these shapes, on the kernels themselves."""
    for (M, N, K), kernel in {
        (72, 24, 40): "linear_fwd_tma_kernel",
        (5, 24, 520): "linear_split_k_kernel",
        (5, 24, 40): "linear_fwd_kernel",
        (72, 23, 40): "linear_fwd_kernel",
    }.items():
        ran.clear()
        fused_linear(torch.randn(M, K).half(), torch.randn(N, K).half(), None, "relu")
        assert ran[0] == kernel, (M, N, K)


def test_warp_specialisation_that_does_not_compile_is_dropped_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []

    def failing(_kernel: Any, _grid: int, _args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if "WARP_SPECIALIZE" in options:
            asked.append(options["WARP_SPECIALIZE"])
        return False

    class Kernel:
        fn, arg_names = kernels().tma.linear_fwd_tma_kernel.fn, kernels().tma.linear_fwd_tma_kernel.arg_names

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> Any:
                if options["WARP_SPECIALIZE"]:
                    raise RuntimeError("\nPassManager::run failed\nmodule {\n")
                return original[grid](*args, **options)

            return run

    original = kernels().tma.linear_fwd_tma_kernel
    monkeypatch.setattr(kernels().tma, "linear_fwd_tma_kernel", Kernel())
    watch_launches(failing)
    monkeypatch.setattr(matmul_plan, "_no_warp_specialization", set())
    x, w = torch.randn(72, 40).half(), torch.randn(24, 40).half()
    with forced_config(CONFIGS["tma_warp_specialized"]), ContractMode() as mode:
        fused_linear(x, w, None, "gelu")
    assert mode.checked
    assert asked == [True, False, False]  # ContractMode runs twice: the second time it is not tried
    (said,) = [r for r in caplog.records if r.name == "fused_ops"]
    assert said.levelname == "WARNING"
    for part in (
        "linear_fwd_tma_kernel", "32x32x32", "num_warps=4", "without warp specialisation",
        "RuntimeError: PassManager::run failed. ",
    ):  # fmt: skip
        assert part in said.getMessage()
    assert "module" not in said.getMessage()  # the compiler's dump stays out


def test_warp_specialisation_that_compiles_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    with forced_config(CONFIGS["tma_warp_specialized"]):
        fused_linear(torch.randn(72, 40).half(), torch.randn(24, 40).half(), None, "gelu")
    assert not [r for r in caplog.records if r.name == "fused_ops"]


def test_allocator_is_set_in_every_thread() -> None:
    """Triton keeps its allocator in a context variable; autograd's threads begin with an empty context."""
    import threading

    from triton.runtime import _allocation

    seen: list[Any] = []

    def work() -> None:
        seen.append(_allocation._allocator.get())
        scratch.ensure_allocator()
        seen.append(_allocation._allocator.get())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(seen[0], _allocation.NullAllocator)
    assert seen[1] is scratch.allocator
