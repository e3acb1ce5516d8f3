"""The numerics contract as a check that tests, and users who add an op, can run.

    |out - exact| <= 0.505 u |exact| + C 2^-24 scale,      NaN, +inf and -inf in equal places

exact is computed in fp64 on the same rounded inputs, u is the spacing of the output's dtype, and scale is sqrt(K) times
the sum of the terms' magnitudes. An op's SPEC gives (exact, scale) for each output of its forward and its backward.

With it comes what a test of an op needs of the library's inside: the classes of an op's declaration, KERNELS (the tuned
kernels, by name), INTERPRET (whether kernels are interpreted), `recorded` and `watch_launches` (the launches that calls make),
`forced` and `forget_plans` (their configurations), `fast_path`, `flops`, `decompositions` and `roles_of`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .._runtime.launch import recorded, watch_launches
from .._runtime.plans import forget_plans
from .._runtime.settings import INTERPRET
from .._runtime.tables import force
from .._runtime.tuned_kernels import KERNELS
from .._torch.eager import fast_path
from .._torch.flops import flops
from .._torch.library import decompositions
from .._torch.spec import REGISTRY, Case, ErrorSample, Expected, Op, Raw, Roles, Sample
from ..kernels.config import RowConfig

__all__ = [
    "INTERPRET",
    "KERNELS",
    "REGISTRY",
    "C",
    "Case",
    "ContractMode",
    "ErrorSample",
    "Expected",
    "Op",
    "Raw",
    "Roles",
    "Sample",
    "assert_within_contract",
    "contract_error",
    "decompositions",
    "fast_path",
    "flops",
    "forced",
    "forget_plans",
    "recorded",
    "roles_of",
    "watch_launches",
]  # fmt: skip

C = 4.0
"""How many times 2^-24 scale an fp32 computation may err."""


def contract_error(out: Tensor, expected: Expected) -> Tensor:
    """|out - exact| over what the contract allows, elementwise in fp64: at most 1 where out is right, inf at a misplaced
    NaN or infinity. out and expected.value have one shape."""
    if out.shape != expected.value.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(expected.value.shape)}")
    info = torch.finfo(out.dtype)
    exact = expected.value.detach().double()
    got = out.detach().double()
    # The interpreter truncates when it stores bf16, so a whole ulp goes there.
    half_ulp = 1.01 if INTERPRET and out.dtype is torch.bfloat16 else 0.505
    arithmetic = 2.0**-53 if out.dtype is torch.float64 else 2.0**-24
    floor = half_ulp * info.smallest_normal * info.eps + (0.0 if out.dtype is torch.float64 else 4 * 2.0**-126)
    allowed = half_ulp * info.eps * exact.abs() + C * arithmetic * expected.scale.detach().double() + floor
    error = (got - exact).abs() / allowed
    rounded = exact.to(out.dtype).double()
    special = ~torch.isfinite(rounded) | ~torch.isfinite(got)
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    near_overflow = torch.isfinite(exact) & ((exact.abs() - info.max).abs() <= allowed + info.eps * info.max)
    error = error.nan_to_num(nan=float("inf")).masked_fill(got == exact, 0.0)  # exact, whatever the scale is
    error = torch.where(special, torch.where(same | near_overflow, 0.0, float("inf")), error)
    return error.masked_fill(expected.scale == float("inf"), 0.0)


def assert_within_contract(out: Tensor, expected: Expected, what: str = "output") -> None:
    """Raise AssertionError, with the worst element, unless out is within the contract."""
    error = contract_error(out, expected)
    if error.numel() and (worst := error.max().item()) > 1.0:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what}: {int((error > 1).sum())} of {error.numel()} elements beyond the contract; the worst, at {index}, by"
            f" {worst:.3g}: got {out[index].item()!r}, exact {expected.value[index].item()!r}"
        )


class ContractMode(TorchDispatchMode):
    """While active, every raw operator of fused_ops that runs is held to its SPEC: the contract on each output, the
    shapes, dtypes and strides of the reference, inputs left bit for bit as they were, and the same bits on a second run."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[str] = []
        self._operators = {raw.overload: raw for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._operators:
            return func(*args, **(kwargs or {}))
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        name = str(func)
        for i, (now, then) in enumerate(zip(args, before)):
            if isinstance(now, Tensor) and not _same_bits(now, then):
                raise AssertionError(f"{name}: argument {i} was changed")
        again = func(*args, **(kwargs or {}))
        reference = self._operators[func].reference(*args)
        for i, (out, second, like) in enumerate(
            zip(
                outputs,
                again if isinstance(again, tuple) else (again,),
                reference if isinstance(reference, tuple) else (reference,),
            )
        ):
            if not _same_bits(out, second):
                raise AssertionError(f"{name}: output {i} differs between two runs on the same arguments")
            got, want = (out.shape, out.dtype, _strides(out)), (like.shape, like.dtype, _strides(like))
            if got != want:
                raise AssertionError(f"{name}: output {i}: (shape, dtype, strides) {got}, the reference's are {want}")
        bounds = self._operators[func].bound(*args)
        if len(bounds) != len(outputs):
            raise AssertionError(f"{name}: {len(outputs)} outputs, {len(bounds)} bounds")
        for i, (out, expected) in enumerate(zip(outputs, bounds)):
            if expected is not None:
                assert_within_contract(out, expected, f"{name} output {i}")
        self.checked.append(name)
        return result


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor, 0 where a dimension of one element may have any."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride()))


@contextlib.contextmanager
def forced(kernel: str, config: RowConfig) -> Iterator[None]:
    """While active, a kernel of KERNELS, such as softmax_fwd, runs with this configuration wherever it can."""
    force(kernel, config)
    try:
        yield
    finally:
        force(kernel, None)


class _Arguments(TorchDispatchMode):
    """While active, notes the arguments of each call of one raw operator."""

    def __init__(self, overload: Any) -> None:
        super().__init__()
        self.overload = overload
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.overload:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def roles_of(op: Op, sample: Sample) -> tuple[str, ...]:
    """The role, a letter of Roles, of each tensor among a sample's arguments.

    They are found by running the public function on the sample: its raw forward operator must get the tensors themselves, or
    views of them. RuntimeError where one does not arrive.
    """
    with torch.no_grad(), _Arguments(op.fwd) as seen:
        op.public(*sample.args, **sample.kwargs)
    raw, letter = op.raw[0], {}
    for args in seen.calls:
        for argument, role in zip(args, raw.roles_of(args).inputs.split()):
            if isinstance(argument, Tensor):
                letter[argument.untyped_storage().data_ptr()] = role
    found = []
    for tensor in (a for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, Tensor)):
        if tensor.untyped_storage().data_ptr() not in letter:
            raise RuntimeError(f"roles_of: {op.name}: a tensor of shape {tuple(tensor.shape)} does not arrive at {raw.name}")
        found.append(letter[tensor.untyped_storage().data_ptr()])
    return tuple(found)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    x = x.detach().contiguous()
    return x.view(integers[x.element_size()]) if x.is_floating_point() and x.element_size() in integers else x
