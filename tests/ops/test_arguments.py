"""Every argument of every public function is given what is wrong: it does what torch does, or is refused in our words."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_ops import REGISTRY, fused_mlp, fused_softmax
from fused_ops.nn import FusedLinear
from fused_ops.testing import Op, fast_path

REFUSALS = (TypeError, RuntimeError, IndexError, NotImplementedError)


class Silent:
    """An object that can be neither shown, compared, hashed nor counted."""

    def _refuse(self, *_: Any) -> Any:
        raise ValueError("not this")

    __repr__ = __str__ = __eq__ = __hash__ = __len__ = __bool__ = __index__ = __float__ = _refuse  # type: ignore[assignment]


class Loud:
    def __repr__(self) -> str:
        return "loud\n" * 100_000


class Dim(enum.IntEnum):
    LAST = 1


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "a float": 1.5,
    "nan": float("nan"),
    "a large int": 2**70,
    "an int of 5,000 digits": 10**5000,
    "a negative int": -7,
    "a string": "relu\n" * 200,
    "bytes": b"relu",
    "a list of a string": ["relu"],
    "a list of floats": [4.0],
    "a long list": list(range(100_000)),
    "a list of tensors": [torch.ones(300, 300)] * 3,
    "a dict": {"relu": torch.ones(3)},
    "an array": np.ones((300, 300)),
    "an array of strings": np.array(["relu", "gelu"]),
    "a number of numpy's": np.float32(1.5),
    "a dtype": torch.int32,
    "a dtype of numpy's": np.dtype("float32"),
    "a class": dict,
    "an object": Silent(),
    "an object of many words": Loud(),
    "a tensor": torch.ones(301, 307),
    "a tensor of integers": torch.ones(301, 307, dtype=torch.int64),
    "a complex tensor": torch.ones(301, 307, dtype=torch.complex64),
    "a tensor without dimensions": torch.tensor(1.5),
    "a tensor of four dimensions": torch.ones(2, 3, 301, 307, dtype=torch.float64),
}


def arguments_of(op: Op) -> dict[str, Any]:
    """All arguments of the op's example, by name."""
    sample = op.example("cpu", torch.float32 if op.trains else torch.bfloat16)
    given = inspect.signature(op.public).bind(*sample.args, **sample.kwargs)
    given.apply_defaults()
    return dict(given.arguments)


ARGUMENTS = [pytest.param(op, name, id=f"{op.name}-{name}") for op in REGISTRY.values() for name in arguments_of(op)]


def check_refusal(op: Op, argument: str, error: Exception, what: str) -> None:
    """That the error is one of REFUSALS, in one short line that names the op and the argument, and shows no tensor."""
    message = str(error)
    assert isinstance(error, REFUSALS), f"{what}: {type(error).__name__}: {message[:300]}"
    assert message.startswith(op.public.__name__ + ": "), f"{what}: {message[:300]}"
    assert argument in message, f"{what}: {message[:300]}"
    assert "allowed: " in message, f"{what}: {message[:300]}"
    assert len(message) < 400, f"{what}: {message[:300]}"
    assert "\n" not in message, f"{what}: {message[:300]}"
    assert "tensor(" not in message, f"{what}: {message[:300]}"


def called(op: Op, given: dict[str, Any]) -> Tensor | Exception:
    """What the public function returns, or raises."""
    try:
        result = op.public(**given)
    except Exception as error:
        return error
    return result if isinstance(result, Tensor) else result[0]


def with_gradients(op: Op, given: dict[str, Any]) -> Tensor | Exception:
    leaves = [t for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()]
    first = leaves[0].detach().requires_grad_(op.trains) if leaves else None
    return called(op, {name: first if leaves and value is leaves[0] else value for name, value in given.items()})


def transformed(op: Op, given: dict[str, Any]) -> Tensor | Exception:
    results = []
    torch.func.vmap(lambda x: (results.append(called(op, given)), x)[1])(torch.zeros(2))
    return results[0]


PATHS: dict[str, Callable[[Op, dict[str, Any]], Tensor | Exception]] = {
    "fast path": called, "gradients": with_gradients, "transform": transformed,
}  # fmt: skip


@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_refused_or_means_what_torch_means(op: Op, argument: str) -> None:
    given = arguments_of(op)
    assert fast_path(*(t for t in given.values() if isinstance(t, Tensor)))
    refused = 0
    for what, value in WRONG.items():
        wrong = {**given, argument: value}
        results = {path: run(op, wrong) for path, run in PATHS.items()}
        errors = {path: result for path, result in results.items() if isinstance(result, Exception)}
        for path, error in errors.items():
            check_refusal(op, argument, error, f"{what}, {path}")
        assert len(errors) in (0, len(PATHS)), f"{what}: refused on {list(errors)} alone"
        assert len({(type(error), str(error)) for error in errors.values()}) <= 1, f"{what}: {errors}"
        if not errors and argument in inspect.signature(op.torch_fn).parameters:
            theirs = op.torch_fn(**wrong)
            expected = theirs if isinstance(theirs, Tensor) else theirs[0]
            got = results["fast path"]
            assert isinstance(got, Tensor)
            assert got.shape == expected.shape, what
            assert got.dtype is expected.dtype, what
        refused += bool(errors)
    assert refused > len(WRONG) // 2


@pytest.mark.parametrize("op", REGISTRY.values(), ids=list(REGISTRY))
def test_a_compiled_call_refuses_in_the_same_words(op: Op) -> None:
    given = arguments_of(op)
    last = list(given)[-1]
    torch._dynamo.reset()
    with pytest.raises(REFUSALS) as caught:
        torch.compile(lambda: op.public(**{**given, last: ["relu"]}), backend="eager")()
    check_refusal(op, last, caught.value, "compiled")
    assert str(caught.value) == str(called(op, {**given, last: ["relu"]}))


INTS = [1, -1, np.int64(1), np.int32(-1), np.uint8(0), Dim.LAST, torch.tensor(1), torch.tensor(-2, dtype=torch.int8)]
NO_INTS = [True, np.True_, 1.0, np.float32(1), "1", (1,), np.array(1), torch.tensor([1]), torch.tensor(True), torch.tensor(1.0)]


@pytest.mark.parametrize("dim", [*INTS, *NO_INTS], ids=repr)
def test_a_dim_is_what_torch_takes_for_an_int(dim: Any) -> None:
    op, x = REGISTRY["softmax"], torch.randn(3, 4)
    for run in PATHS.values():
        got = run(op, {"input": x, "dim": dim})
        if any(dim is one for one in INTS):
            assert isinstance(got, Tensor)
            torch.testing.assert_close(got.detach(), torch.softmax(x, dim))
        else:
            assert isinstance(got, TypeError)
            check_refusal(op, "dim", got, repr(dim))
            with pytest.raises(TypeError):
                torch.softmax(x, dim)


def test_a_dim_that_is_no_int_to_a_compiler_or_a_transform() -> None:
    x = torch.randn(3, 4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(
            lambda x, dim: fused_softmax(x, dim) + fused_softmax(x, np.int64(0)), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(x, torch.tensor(1)), x.softmax(1) + x.softmax(0))
    with pytest.raises(
        RuntimeError, match=r"fused_softmax: dim: got a Tensor of .* whose value is not known here, allowed: an int"
    ):
        torch.func.vmap(lambda dim: fused_softmax(x, dim))(torch.tensor([0, 1]))


def test_a_dtype_is_what_torch_takes_for_one() -> None:
    x = torch.randn(3, 4)
    assert fused_softmax(x, dtype=float).dtype is torch.softmax(x, -1, float).dtype  # type: ignore[arg-type, call-overload]
    for dtype in (torch.bits8, torch.complex64):
        y = torch.zeros(3, 4, dtype=torch.uint8).view(dtype) if dtype is torch.bits8 else x.to(dtype)
        with pytest.raises(NotImplementedError, match=r"fused_softmax: input: got torch\.\w+, allowed: a real dtype"):
            fused_softmax(y, dtype=torch.float32)


@pytest.mark.parametrize("bias", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_the_bias_of_an_fp8_linear_is_of_a_documented_dtype(bias: torch.dtype) -> None:
    op = REGISTRY["linear_fp8"]
    given = arguments_of(op)
    given["bias"] = given["bias"].to(bias)
    for run in PATHS.values():
        got = run(op, given)
        assert isinstance(got, RuntimeError)
        assert str(got).startswith(f"fused_linear_fp8: bias: got {bias}, allowed: torch.bfloat16")


def test_numpys_booleans_are_booleans() -> None:
    x, w, v = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 5)
    assert torch.equal(fused_mlp(x, w, None, v, None, recompute=np.True_), fused_mlp(x, w, None, v, None))  # type: ignore[arg-type]


def test_modules_refuse_an_activation_in_the_same_words() -> None:
    with pytest.raises(TypeError, match=r"^FusedLinear: activation: got \['relu'\] of type list, allowed: None, 'relu'"):
        FusedLinear(3, 4, activation=["relu"])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"^FusedLinear: activation: got 'swish', allowed: None, 'relu'"):
        FusedLinear(3, 4, activation="swish")
