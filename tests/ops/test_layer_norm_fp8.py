"""fused_layernorm_fp8 in ATen mode: its samples and refusals, and what its output is for: an fp8 product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import REGISTRY, fused_layernorm_fp8, fused_linear_fp8
from fused_ops.ops.linear.cases.linear_fp8 import quantise
from fused_ops.testing import INTERPRET, ContractMode, contract_error

SPEC = REGISTRY["layer_norm_fp8"]
aten_mode = pytest.mark.skipif(INTERPRET, reason="ATen mode: unset TRITON_INTERPRET")


@aten_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_samples(dtype: torch.dtype) -> None:
    for sample in SPEC.samples("cpu", dtype):
        with ContractMode() as mode:
            q, scale = fused_layernorm_fp8(*sample.args)
        assert mode.checked == ["fused_ops.layer_norm_fp8_fwd.default"], sample.name
        shape = sample.args[1]
        assert (q.dtype, q.shape, q.is_contiguous()) == (torch.float8_e4m3fn, sample.args[0].shape, True)
        assert (scale.dtype, scale.shape) == (torch.float32, q.shape[: q.dim() - len(shape)])


@aten_mode
def test_refusals() -> None:
    errors = list(SPEC.errors("cpu"))
    assert len(errors) >= 8
    for error in errors:
        with ContractMode() as mode, pytest.raises(error.raises, match=error.match) as caught:
            SPEC.public(*error.args, **error.kwargs)
        assert str(caught.value).startswith("fused_layernorm_fp8: ")
        assert not mode.checked
    with torch.no_grad():
        fused_layernorm_fp8(torch.randn(2, 4, requires_grad=True), [4])


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((37, 96), (96,), (96,)))
    return x.to(dtype) * 3 + 1, w.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_from_quantising_the_fp32_layer_norm(dtype: torch.dtype) -> None:
    """Byte for byte the same but where fp32 rounding moves a value over the middle between two e4m3 numbers."""
    x, w, b = case(dtype)
    q, scale = fused_layernorm_fp8(x, [96], w, b)
    expected, expected_scale = quantise(F.layer_norm(x.float(), (96,), w.float(), b.float()), True)
    torch.testing.assert_close(scale, expected_scale, atol=0.0, rtol=1e-6)
    steps = (q.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()  # neighbours of one sign differ by 1
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3
    assert q.float().abs().amax(-1).eq(448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feeds_an_fp8_product(dtype: torch.dtype) -> None:
    """(q * scale) @ W^T is within half an e4m3 spacing of each term of y @ W^T, y the layer norm in fp64.

    |q * scale - y| <= max(2^-4 |y|, 2^-10 scale), and as much again in 2^-16 parts for fp32; then 2^-9 for bf16 output.
    """
    x, w, b = case(dtype)
    weight, weight_scale = quantise(torch.randn(24, 96), True)
    q, scale = fused_layernorm_fp8(x, [96], w, b)
    out = fused_linear_fp8(q, weight, scale, weight_scale, out_dtype=torch.float32)
    y = F.layer_norm(x.double(), (96,), w.double(), b.double())
    W = weight.double() * weight_scale.double()[:, None]
    term = torch.maximum(y.abs() * 2.0**-4, scale.double()[:, None] * 2.0**-10) + y.abs() * 2.0**-16
    error, allowed = (out.double() - y @ W.t()).abs(), term @ W.abs().t() + 2.0**-18 * (y.abs() @ W.abs().t())
    assert (error <= allowed).all()
    assert error.max() > 0.02 * allowed.max()  # the bound is of the error's size
    assert out.shape == (37, 24)
    three = fused_linear_fp8(q.view(1, 37, 96), weight, scale.view(1, 37), weight_scale)  # as any input and input_scale
    torch.testing.assert_close(three[0].float(), out, atol=1e-2, rtol=1e-2)


def test_contract_catches_a_scale_of_another_row() -> None:
    x, w, b = case(torch.float32)
    expected_q, expected_scale = SPEC.bound(x, w, b, 1e-5)
    q, scale = fused_layernorm_fp8(x, [96], w, b)
    assert contract_error(scale, expected_scale).max() <= 1
    assert contract_error(q, expected_q).max() <= 1
    assert contract_error(scale.roll(1), expected_scale).max() > 100
    truncated = (q.float() * (1 - 2.0**-3)).to(q.dtype)  # rounded towards zero, more or less
    assert contract_error(truncated, expected_q).max() > 1.5


def test_several_normalised_dimensions_and_an_int() -> None:
    x, w = torch.randn(4, 5, 6), torch.randn(5, 6)
    q, scale = fused_layernorm_fp8(x, [5, 6], w)
    flat_q, flat_scale = fused_layernorm_fp8(x.flatten(1), 30, w.flatten())  # type: ignore[arg-type]
    assert (q.shape, scale.shape) == ((4, 5, 6), (4,))
    assert torch.equal(q.flatten(1).view(torch.uint8), flat_q.view(torch.uint8))
    assert torch.equal(scale, flat_scale)


@aten_mode
def test_scripts_and_compiles_in_one_graph() -> None:
    x, w, b = case(torch.float32)
    expected = fused_layernorm_fp8(x, [96], w, b)

    def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        q, scale = fused_layernorm_fp8(x, [96], w, b)
        return q.float() * scale.unsqueeze(-1)

    value = expected[0].float() * expected[1].unsqueeze(-1)
    torch.testing.assert_close(torch.jit.script(block)(x, w, b), value, atol=0.0, rtol=0.13)  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x, w, b), value)
    torch.library.opcheck(SPEC.fwd, (x, w, b, 1e-5))
