"""One op, one SPEC: all that others read of an op, code and tests alike, is said once, in its Op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Sample:
    """A sample input: the arguments of one call of a public function, under a name that says what is special about it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ErrorSample:
    """Arguments that a public function must refuse: with this exception type and a message that matches the pattern."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raises: type[Exception]
    match: str


@dataclass(frozen=True)
class Expected:
    """What the numerics contract allows for one output: |o - value| <= 0.505 u |value| + c 2^-24 scale.

    value: fp64, the exact result on the rounded inputs. scale: fp64, sqrt(K) times the sum of the terms' magnitudes; inf
    where any value will do (a mean of infinities, which nothing reads).
    """

    value: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Case:
    """A benchmark shape: make(device) returns (args, kwargs) of the public function."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """What is measured of an op: benchmark shapes, each one's least bytes and FLOPs (forward, backward), eager baselines."""

    cases: Callable[[], Iterator[Case]]
    bytes: Callable[[Case], tuple[int, int]]
    flops: Callable[[Case], tuple[int, int]]
    baselines: dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class AuditCase:
    """One ahead-of-time compilation: a kernel with the signature and constants of one launch."""

    kernel: Any
    config: str
    dtype: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: bool = True
    num_ctas: int = 1


@dataclass(frozen=True)
class Backward:
    """The backward as its own op: schema, ATen reference, kernel launcher, and its contract bound."""

    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]


@dataclass(frozen=True)
class Raw:
    """A raw operator, forward or backward: what is registered with torch as fused_ops::<name>."""

    name: str
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]

    @property
    def overload(self) -> Any:
        """fused_ops::<name>.default, once it is registered."""
        return getattr(torch.ops.fused_ops, self.name).default


@dataclass(frozen=True)
class Op:
    """Everything about one op. Every field is required, and a test checks each.

    public: the function users call. torch_fn: the eager baseline, what PyTorch users write today, with the same arguments.
    schema, reference, launch, bound: the raw forward operator. reference is pure ATen, and serves as CPU implementation,
    fake and ONNX decomposition. backward: the raw backward operator, None for an op without gradients. samples: called with
    (device, dtype). errors: called with (device). audit: called with (capability).
    """

    name: str
    public: Callable[..., Any]
    torch_fn: Callable[..., Any]
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]
    backward: Backward | None
    samples: Callable[[str, torch.dtype], Iterator[Sample]]
    errors: Callable[[str], Iterator[ErrorSample]]
    bench: Bench
    audit: Callable[[tuple[int, int]], Iterator[AuditCase]]

    @property
    def trains(self) -> bool:
        """Whether the op has gradients."""
        return self.backward is not None

    @property
    def raw(self) -> tuple[Raw, ...]:
        """The raw operators: the forward and, where the op has gradients, the backward."""
        forward = Raw(f"{self.name}_fwd", self.schema, self.reference, self.launch, self.bound)
        if (back := self.backward) is None:
            return (forward,)
        return forward, Raw(f"{self.name}_bwd", back.schema, back.reference, back.launch, back.bound)

    @property
    def fwd(self) -> Any:
        """The registered forward overload, fused_ops::<name>_fwd.default."""
        return getattr(torch.ops.fused_ops, f"{self.name}_fwd").default

    @property
    def bwd(self) -> Any:
        """The registered backward overload, fused_ops::<name>_bwd.default."""
        return getattr(torch.ops.fused_ops, f"{self.name}_bwd").default
