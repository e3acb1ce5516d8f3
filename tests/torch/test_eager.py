"""The fast path past the dispatcher: which modes, contexts, transforms and tensors keep a call from it, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from fused_ops import fused_layernorm, fused_linear
from fused_ops.testing import INTERPRET, fast_path
from tests.torch.calls import ROWS, Call, OperatorsSeen, each_call

WITHOUT_GRADIENTS = None if INTERPRET else "aten"
WITH_GRADIENTS = None if INTERPRET else "cpu grad"


class Watching(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(Tensor):
    """A subclass with __torch_function__."""


class Silent(Tensor):
    """A subclass without."""

    __torch_function__ = torch._C._disabled_torch_function_impl


WATCHERS: dict[str, Callable[[], Any]] = {
    "dispatch mode": OperatorsSeen,
    "fake tensors": FakeTensorMode,
    "function mode": Watching,
    "device context": lambda: torch.device("cpu"),
    "profiler": lambda: profile(activities=[ProfilerActivity.CPU]),
    "old profiler": torch.autograd.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
CHANGERS: dict[str, Callable[[], Any]] = {
    "forward AD": forward_ad.dual_level,
}


def test_tensors_that_take_the_fast_path() -> None:
    x, w = torch.randn(2, 3), Parameter(torch.randn(3))
    assert fast_path(x) == fast_path(x, None, x) == WITHOUT_GRADIENTS
    assert fast_path(w, None, x) == fast_path(x, w, None) == fast_path(x, None, w) == WITH_GRADIENTS
    with torch.no_grad():
        assert fast_path(w, w, w) == WITHOUT_GRADIENTS
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        assert fast_path(w, x) == WITHOUT_GRADIENTS


@pytest.mark.parametrize("name", [*WATCHERS, *CHANGERS])
def test_contexts(name: str) -> None:
    """Under a watcher our operators run, under autocast once the arguments are cast; a changer is one that ATen's functions know."""
    x, w = torch.randn(2, 3), torch.randn(3, requires_grad=True)
    with (WATCHERS | CHANGERS)[name]():
        assert fast_path(x, w, w) is None
        assert fast_path(x, x, x) == (None if name in WATCHERS else WITHOUT_GRADIENTS)
    assert fast_path(x, w, w) == WITH_GRADIENTS


def test_transforms_and_tracers() -> None:
    found: list[str | None] = []
    w = torch.randn(3, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        found.append(fast_path(x, w))
        return x.sum()

    x = torch.randn(2, 3)
    torch.func.vmap(function)(x)
    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    torch.func.functionalize(function)(x)
    torch.jit.trace(function, (x,), check_trace=False)
    make_fx(function)(x)
    make_fx(function, pre_dispatch=True)(x)
    assert found == [None] * len(found)
    assert len(found) >= 7
    compiled = torch.compile(lambda x: x + (1 if fast_path(x) is None else 2), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
@each_call
def test_cpu_autocast_without_gradients(call: Call, dtypes: tuple[str, str]) -> None:
    """A call under autocast casts as ATen does and then computes outside it: the bits of a call on tensors already cast."""
    rows, parameters = (getattr(torch, dtype) for dtype in dtypes)
    tensors = [t.to(rows if letter in ROWS else parameters) for t, letter in zip(call.tensors(), call.letters)]
    with torch.autocast("cpu", dtype=torch.bfloat16), OperatorsSeen() as seen:
        out, expected = call.ours(*tensors), call.aten(*tensors)
    assert seen == [str(call.op.fwd)]
    assert out.dtype is expected.dtype
    casts = out.dtype is not tensors[0].dtype or any(t.dtype is not out.dtype for t in tensors)
    assert torch.equal(
        out, call.ours(*[t.to(out.dtype) for t in tensors] if casts and call.op.raw[0].roles.multiplies else tensors)
    )


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("disabled", [False, True])
def test_tensors_that_do_not_take_the_fast_path(position: int, disabled: bool) -> None:
    """A tensor subclass does not take it even if its __torch_function__ is switched off."""
    tensor = torch.randn(3)
    others: list[Any] = [tensor.as_subclass(Overriding), tensor.as_subclass(Silent), tensor.to("meta"), 3.0, [1.0]]
    with torch._C.DisableTorchFunction() if disabled else contextlib.nullcontext():
        for other in others:
            tensors: list[Any] = [tensor] * 3
            tensors[position] = other
            assert fast_path(*tensors) is None, (position, type(other))


def test_bad_arguments_get_one_error_of_ours() -> None:
    """The fast path hands nothing to ATen that the checks would have refused."""
    x, w = torch.randn(2, 3), torch.randn(3)
    for arguments in (
        (x.long(), (3,)), (x[:0].long(), (3,)), (x, (4,)), (x, (3,), w.long()), (x, (3,), w[:2]), (x, (3,), w, w[:2]),
        (x[:0], (3,), w, w.long()), (x, (3,), w.view(1, 3)), (x, (3,), w.to("meta")), (x[0, 0], (1,)), (x, ()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"^fused_layernorm: "):
            fused_layernorm(*arguments)  # type: ignore[arg-type]
    W = torch.randn(4, 3)
    for arguments in (
        (x.long(), W.long()), (x, W.double()), (x, W, torch.randn(2, 4)), (x, W.view(1, 4, 3)), (x[0, 0], W), (x, W.t()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"^fused_linear: "):
            fused_linear(*arguments)  # type: ignore[arg-type]


def test_the_result_is_contiguous_whatever_the_strides() -> None:
    for x in (torch.randn(4, 6).t(), torch.randn(4, 6, 2)[..., 0], torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
              torch.randn(1, 6).as_strided((1, 6), (99, 1)), torch.randn(1, 6).expand(4, 6)):  # fmt: skip
        N = x.shape[-1]
        w, b, W = torch.randn(2 * N)[::2], torch.randn(N), torch.randn(N, 7).t()
        for ours, aten in (
            (fused_layernorm(x, (N,), w, b), F.layer_norm(x, (N,), w, b)), (fused_linear(x, W), F.linear(x, W)),
        ):  # fmt: skip
            assert ours.stride() == aten.contiguous().clone(memory_format=torch.contiguous_format).stride()
            torch.testing.assert_close(ours, aten)
