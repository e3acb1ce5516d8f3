"""One op, one SPEC: all that others read of an op, code and tests alike, is said once, in its Op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._runtime.tuned_kernels import Tuned

REGISTRY: dict[str, Op] = {}


@dataclass(frozen=True)
class Sample:
    """A sample input: the arguments of one call of a public function, under a name that says what is special about it.

    tags: what it can serve for. "basic": the small ordinary call, one of each op. "smooth": small, finite, and smooth enough
    for finite differences. "addressing": its kernels address memory in a way of their own: what sanitizers run. "first": one of
    the few that stand for all where each takes seconds. "slow": takes many where kernels are interpreted.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()


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
class Headline:
    """Benchmark cases that are measured, tuned and shown before others.

    rank: their place among those of all ops, 1 first. cases: names. passes: "fwd", "train_fwd", "bwd" or "fwd+bwd", kernel
    time; with ":wall" the wall time of a call. dtype: of the cases.
    """

    rank: int
    cases: tuple[str, ...]
    passes: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Bench:
    """What is measured of an op.

    make: called with (device, shape, dtype, variant), gives the (args, kwargs) of the public function. shapes: by name.
    variants: activations; a case is named <shape>_<variant>, or <shape> where there are none. bytes, flops: a case's least
    bytes and FLOPs, (forward, backward). headline: the cases that matter most. baselines: what it is compared with.
    """

    make: Callable[[str, Any, torch.dtype, str | None], tuple[tuple[Any, ...], dict[str, Any]]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    bytes: Callable[[Case], tuple[int, int]]
    flops: Callable[[Case], tuple[int, int]]
    baselines: dict[str, Callable[..., Any]]
    headline: tuple[Headline, ...]
    variants: tuple[str | None, ...] = ()

    def cases(self) -> Iterator[Case]:
        """Every shape in every dtype and variant."""
        for name, shape in self.shapes.items():
            for dtype in self.dtypes:
                for variant in self.variants or (None,):
                    case = f"{name}_{variant}" if self.variants else name
                    yield Case(case, dtype, shape, functools.partial(self._made, shape, dtype, variant))

    def _made(self, shape: Any, dtype: torch.dtype, variant: str | None, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.make(device, shape, dtype, variant)


@dataclass(frozen=True)
class Roles:
    """What each argument and each output of a raw operator is: how it is sharded and what it multiplies follow from it.

    inputs and outputs: a letter for each, separated by spaces. Tensors of one letter are sharded alike, and a gradient has
    the letter of the tensor it is of.

        -     an argument that is no tensor
        x     (..., K)  the input                         s     (...)   one number a row: a statistic
        y     (..., N)  the first product, and what is saved of it
        z     (..., N)  the second product, of an MLP
        w, b  (N, K), (N,)  weight and bias of y          W, B  weight and bias of z
        v     (K,)  a norm's weight or bias
        q     a scale: one number, or one a row. An operator that has one runs on replicated tensors: always right, at the
              price of communication

    A number after an output's letter, "y4", is the argument that says whether the output is needed; it is empty if not.
    dim: the argument that holds the dimension which no shard may cut, or None for the last dimension.
    sums: whether, for the operator's arguments, products of parts of K are parts of the result, which is their sum; None for no.
    """

    inputs: str
    outputs: str
    dim: int | None = None
    sums: Callable[..., bool] | None = None

    @property
    def multiplies(self) -> bool:
        """Whether there is a product with a weight."""
        return not {"w", "W"}.isdisjoint(self.inputs + self.outputs)


@dataclass(frozen=True)
class Backward:
    """The backward as its own op: schema, ATen reference, kernel launcher, its contract bound, and the roles of its tensors.

    roles: a Roles, or a function from the operator's arguments to one. tuned, formula: as Op's, for the backward.
    """

    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]
    roles: Roles | Callable[..., Roles]
    tuned: Tuned | None = None
    formula: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Raw:
    """A raw operator, forward or backward: what is registered with torch as fused_ops::<name>."""

    name: str
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]
    roles: Roles | Callable[..., Roles]
    tuned: Tuned | None
    formula: Callable[..., Any]
    forward: bool

    @property
    def overload(self) -> Any:
        """fused_ops::<name>.default, once it is registered."""
        return getattr(torch.ops.fused_ops, self.name).default

    def roles_of(self, args: Sequence[Any]) -> Roles:
        """The roles of the tensors in a call with args."""
        return self.roles if isinstance(self.roles, Roles) else self.roles(*args)


@dataclass(frozen=True)
class Op:
    """Everything about one op. Every field without a default is required, and a test checks each.

    public: the function users call. torch_fn: the eager baseline, what PyTorch users write today, with the same arguments.
    schema, reference, launch, bound: the raw forward operator. reference is pure ATen, and serves as CPU implementation,
    fake and ONNX decomposition. roles: what the raw forward operator's arguments and outputs are. backward: the raw backward
    operator, None for an op without gradients. samples: called with (device, dtype). errors: called with (device). audit: called with (device),
    gives the calls whose launches, forward and backward, are compiled ahead of time; a name says what is special, or "".

    None where an op has none: onnx, called with (a builder of ONNX operators, their opset), returns the function that
    torch.onnx calls in place of the raw forward operator; it raises ValueError for what ONNX cannot say. module: the torch.nn
    class whose whole forward is this op; `fuse` puts its subclass from fused_ops.nn in its place. reason: called with the raw
    forward operator's arguments on a GPU, says why they are computed as they are, for `explain`. tuned: what `fused-ops tune`
    may choose for the forward's kernel. formula: the reference in the words of ATen's own decompositions, which torch.compile
    fuses with its neighbours; None where the reference is that.
    """

    name: str
    public: Callable[..., Any]
    torch_fn: Callable[..., Any]
    schema: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    bound: Callable[..., tuple[Expected | None, ...]]
    roles: Roles
    backward: Backward | None
    samples: Callable[[str, torch.dtype], Iterator[Sample]]
    errors: Callable[[str], Iterator[ErrorSample]]
    bench: Bench
    audit: Callable[[str], Iterator[Sample]]
    onnx: Callable[[Any, int], Callable[..., Any]] | None = None
    module: type[nn.Module] | None = None
    tuned: Tuned | None = None
    reason: Callable[..., str] | None = None
    formula: Callable[..., Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether the op has gradients."""
        return self.backward is not None

    @property
    def raw(self) -> tuple[Raw, ...]:
        """The raw operators: the forward and, where the op has gradients, the backward."""
        forward = Raw(
            f"{self.name}_fwd", self.schema, self.reference, self.launch, self.bound, self.roles, self.tuned,
            self.formula or self.reference, forward=True,
        )  # fmt: skip
        if (back := self.backward) is None:
            return (forward,)
        return forward, Raw(
            f"{self.name}_bwd", back.schema, back.reference, back.launch, back.bound, back.roles, back.tuned,
            back.formula or back.reference, forward=False,
        )  # fmt: skip

    def example(self, device: str, dtype: torch.dtype) -> Sample:
        """The sample that is tagged "basic": a small ordinary call."""
        return next(sample for sample in self.samples(device, dtype) if "basic" in sample.tags)

    @property
    def fwd(self) -> Any:
        """The registered forward overload, fused_ops::<name>_fwd.default."""
        return getattr(torch.ops.fused_ops, f"{self.name}_fwd").default

    @property
    def bwd(self) -> Any:
        """The registered backward overload, fused_ops::<name>_bwd.default."""
        return getattr(torch.ops.fused_ops, f"{self.name}_bwd").default
