"""A raw operator's result depends on its arguments alone: the caller's autocast regions change nothing, on any path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY, fused_gated_linear, fused_linear, fused_linear_fp8, fused_mlp
from fused_ops.ops.linear import linear_fp8_launch
from fused_ops.testing import Op, decompositions
from tests.contract import leaves

AUTOCAST = (torch.bfloat16, torch.float16)


@contextmanager
def autocast_everywhere(dtype: torch.dtype) -> Iterator[None]:
    """Autocast of CPU and CUDA tensors, switched on as torch.autocast does it, which needs no CUDA device."""
    states = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    try:
        for device, *_ in states:
            torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device, enabled, before in states:
            torch.set_autocast_dtype(device, before)
            torch.set_autocast_enabled(device, enabled)


class Recorded(TorchDispatchMode):
    """The raw operators that run, with their arguments: (raw operator's overload, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.known = {raw.overload for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.known:
            self.calls.append((func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def raw_calls(op: Op, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of raw operators in one call of the op, forward and backward."""
    sample = op.example("cpu", dtype)
    args, wanted = leaves(sample.args) if op.trains else (sample.args, [])
    with Recorded() as recorded:
        out = op.public(*args, **sample.kwargs)
        if wanted:
            out.sum().backward()
    assert recorded.calls
    return recorded.calls


def same(out: Any, expected: Any) -> bool:
    outs, others = ((t,) if isinstance(t, Tensor) else t for t in (out, expected))
    return all(
        a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(outs, others, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize(("op", "dtype"), [
    pytest.param(op, dtype, id=f"{name}-{str(dtype)[6:]}") for name, op in REGISTRY.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float64) if op.trains or dtype is not torch.float64
])  # fmt: skip
def test_a_raw_operator_is_outside_the_region(op: Op, dtype: torch.dtype, autocast: torch.dtype) -> None:
    """As registered for the CPU, for other devices and for fake tensors, and as decomposed."""
    table = decompositions()
    for overload, args in raw_calls(op, dtype):
        expected = overload(*args)
        ways: dict[str, Callable[..., Any]] = {
            "registered": overload,
            "other devices": lambda *a, overload=overload: overload._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *a),
            "decomposed": table[overload],
        }
        with autocast_everywhere(autocast):
            for way, run in ways.items():
                assert same(run(*args), expected), (str(overload), way)
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = overload(*fakes)
            assert torch.is_autocast_enabled("cpu")
        for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (fake, expected)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in REGISTRY.items() if not op.trains])
def test_forward_only_ops_are_outside_the_region(op: Op, autocast: torch.dtype) -> None:
    """They cast nothing under autocast: neither called, nor compiled, nor transformed, where ATen's formula runs."""
    torch._dynamo.reset()
    args, kwargs = (sample := op.example("cpu", torch.float32)).args, sample.kwargs
    expected = op.public(*args, **kwargs)
    i = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype is torch.float32)

    def of(tensor: Tensor) -> Any:
        return op.public(*args[:i], tensor, *args[i + 1 :], **kwargs)

    with autocast_everywhere(autocast):
        assert same(op.public(*args, **kwargs), expected)
        assert same(torch.compile(of, fullgraph=True, backend="aot_eager")(args[i]), expected)
        transformed = torch.func.vmap(of)(args[i].unsqueeze(0))
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (transformed, expected)), strict=True):
        torch.testing.assert_close(a.squeeze(0).float(), b.float(), atol=1e-2, rtol=1e-2)


def test_before_ada_the_operands_are_widened_outside_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """As registered for CUDA, on a GPU that cannot multiply e4m3."""
    monkeypatch.setattr(linear_fp8_launch, "properties_of", lambda _: ((8, 0), 108))
    for overload, args in raw_calls(REGISTRY["linear_fp8"], torch.float32):
        with torch.autocast("cpu", dtype=torch.float16):
            out = overload._op_dk(torch._C.DispatchKey.CUDA, *args)
        assert same(out, overload(*args))


def test_products_beyond_half_precision_inside_a_region() -> None:
    x = torch.full((1, 256), 448.0).to(torch.float8_e4m3fn)
    scale = torch.tensor(1e-3)
    with torch.autocast("cpu", dtype=torch.float16):
        out = fused_linear_fp8(x, x, scale, scale, None, None, torch.float32)
    torch.testing.assert_close(out, torch.tensor([[256 * 0.448**2]]))


LINEARS: dict[str, Callable[..., Tensor]] = {
    "fused_linear": lambda x, w, v, b: fused_linear(x, w, b),
    "fused_gated_linear": lambda x, w, v, b: fused_gated_linear(x, w, v, "silu", b),
    "fused_mlp": lambda x, w, v, b: fused_mlp(x, w, b, v, None),
}
ARGUMENTS = {"fused_linear": ("weight", None, "bias"), "fused_gated_linear": ("gate_weight", "up_weight", "gate_bias"),
             "fused_mlp": ("weight1", "weight2", "bias1")}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", LINEARS)
def test_autocast_casts_no_float64(name: str, requires_grad: bool) -> None:
    """torch.nn.functional.linear refuses a mix with float64 under autocast, and leaves float64 alone as it is."""
    run = LINEARS[name]

    def tensors(*dtypes: torch.dtype) -> list[Tensor]:
        return [
            torch.randn(s).to(d).requires_grad_(requires_grad)
            for s, d in zip(((4, 4), (4, 4), (4, 4), (4,)), dtypes, strict=True)
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(*tensors(*[torch.float64] * 4)).dtype is torch.float64
        for low in (torch.float32, torch.float16, torch.bfloat16):
            assert run(*tensors(low, torch.float32, torch.float16, torch.bfloat16)).dtype is torch.bfloat16
            for i, argument in enumerate(("input", *ARGUMENTS[name])):
                if argument is not None:
                    dtypes = [low] * 4
                    dtypes[i] = torch.float64
                    named = argument if i else ARGUMENTS[name][0]  # the first that does not fit input
                    with pytest.raises(RuntimeError, match=f"{name}: {named}: got .*, allowed: the dtype of input"):
                        run(*tensors(*dtypes))
