"""What one forward of a model computes, by kind, and how much of it a fused operator computes: what is left to fuse.

A dispatch mode sees every operator that runs. Of each tensor it remembers what it is: a weight, a product of an input with a
weight, a function of such a product element by element, a part of another tensor, a step of a norm that is written out.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .._torch.spec import REGISTRY, Op, Raw

LAYER_NORM = "layer_norm"
RMS_NORM = "rms_norm"
SOFTMAX = "softmax"
LINEAR = "linear"
GATE = "gated_linear"
ADD_NORM = "add_norm"
KINDS = (LAYER_NORM, RMS_NORM, SOFTMAX, LINEAR, GATE, ADD_NORM)

# name of an operator that multiplies matrices -> where its first matrix is
_PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1,
    "_grouped_mm": 0, "_scaled_mm": 0, "_scaled_grouped_mm": 0, "_int_mm": 0, "_weight_int8pack_mm": 0, "linear_dynamic": 0,
}  # fmt: skip
_ACTIVATIONS = frozenset((
    "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "erf", "elu", "celu", "leaky_relu", "_prelu_kernel", "mish", "softplus",
    "hardswish", "hardsigmoid", "hardtanh", "log_sigmoid_forward", "threshold", "glu", "rrelu_with_noise",
))  # fmt: skip
_SAME = frozenset((
    "clone", "_to_copy", "_unsafe_view", "alias", "detach", "lift_fresh", "native_dropout", "view_copy",
    "squeeze", "unsqueeze", "transpose", "t",  # in place, they are no views
))  # fmt: skip
_PARTS = frozenset(("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"))  # besides the views
_GATHERS = frozenset(("index", "index_select", "gather"))
_SHAPED_LIKE = ("_like", "new_")  # operators that read a tensor's shape, not its values
_ENCODER_LAYER = "_transformer_encoder_layer_fwd"  # a whole layer as torch's own operator, outside training

Source = tuple[object, tuple[Any, ...]]  # what was computed, and which part of it


@dataclass(eq=False)
class _Product:
    """A product of an input with a weight. counted: whether an activation of it has been counted."""

    input: Source
    counted: bool = False


@dataclass(frozen=True, eq=False)
class _Value:
    """What a tensor is; views, casts and copies share one.

    source: which computed values it has. weight: whether they come from parameters alone. product: the _Product, or the part of
    one, that it is a function of element by element. active: whether an activation is in that function. step, of: which step of
    a norm, and of what. centered: what it is, less its mean. added: whether it is the sum of two tensors. noise: a dropout's mask.
    """

    source: Source
    weight: bool = False
    product: Source | None = None
    active: bool = False
    step: str = ""
    of: Source | None = None
    centered: Source | None = None
    added: bool = False
    noise: bool = False

    def part(self, *key: Any) -> _Value:
        """A part of this value; equal keys are equal parts."""
        return _Value(
            _part(self.source, key),
            weight=self.weight,
            product=self.product and _part(self.product, key),
            active=self.active,
            noise=self.noise,
        )


def _part(source: Source, key: tuple[Any, ...]) -> Source:
    return source[0], (*source[1], key)


def _new(**what: Any) -> _Value:
    return _Value((object(), ()), **what)


@dataclass(eq=False)
class _Call:
    """One operator's call. tensors: all tensors in its arguments, with their values."""

    name: str
    func: Any
    args: tuple[Any, ...]
    out: Any
    tensors: list[Tensor]
    values: list[_Value]
    pointwise: bool = field(init=False)

    def __post_init__(self) -> None:
        self.pointwise = torch.Tag.pointwise in self.func.tags or self.name in _ACTIVATIONS

    def operands(self) -> list[_Value]:
        """The values of its tensors, without single numbers that come from parameters alone."""
        return [v for t, v in zip(self.tensors, self.values) if not (v.weight and t.numel() == 1)]

    def scalar(self) -> Any:
        """Its second argument where that is a number."""
        number = self.args[1] if len(self.args) > 1 else None
        return number if isinstance(number, (int, float)) else None


class _Counting(TorchDispatchMode):
    """Counts while it is active; inputs are the tensors that come from outside and are no weights."""

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.counts = {kind: [0, 0] for kind in KINDS}
        self.values = WeakIdKeyDictionary()
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self.values[tensor] = _new()
        self.fused = {raw.overload: (op, raw) for op in REGISTRY.values() for raw in op.raw if raw.forward}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.fused and func._can_decompose():  # in inference mode, where nothing has decomposed it
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [self.value(tensor) for tensor in tensors]  # before an operator in place changes what they are
        out = func(*args, **kwargs)
        if func in self.fused:
            result = self.fused_operator(
                *self.fused[func], args, [self.value(a) if isinstance(a, Tensor) else None for a in args]
            )
        else:
            packet = func.overloadpacket.__name__
            inplace = packet.endswith("_") and not packet.startswith("__")
            result = self.operator(_Call(packet.rstrip("_") if inplace else packet, func, args, out, tensors, values))
        for tensor in _outputs(out):
            self.values[tensor] = next(result, None) or _new()
        return out

    def value(self, tensor: Tensor) -> _Value:
        """What tensor is; one that no operator made is a weight."""
        found = self.values.get(tensor)
        if found is None:
            found = self.values[tensor] = _new(weight=True)
        return found

    def count(self, kind: str, fused: bool = False) -> None:
        self.counts[kind][0] += fused
        self.counts[kind][1] += 1

    def norm(self, kind: str, input: _Value, fused: bool = False) -> None:
        self.count(kind, fused)
        if input.added:
            self.count(ADD_NORM)

    def activated(self, product: Source, fused: bool = False) -> None:
        """An activation of a product: counted once a product."""
        made = product[0]
        if isinstance(made, _Product) and not made.counted:
            made.counted = True
            self.count(LINEAR, fused)

    def fused_operator(self, op: Op, raw: Raw, args: tuple[Any, ...], values: list[_Value | None]) -> Iterator[_Value]:
        """A raw operator of fused_ops: what it is follows from its arguments' roles."""
        input = values[0] or _new()
        roles = raw.roles_of(args).inputs.split()
        if not op.roles.multiplies:
            if op.name.startswith("add_"):
                self.count(ADD_NORM, fused=True)
                input = _new()
            for kind in (LAYER_NORM, RMS_NORM):
                if kind in op.name:
                    self.norm(kind, input, fused=True)
            if SOFTMAX in op.name and not op.name.startswith("log_"):
                self.count(SOFTMAX, fused=True)
            return iter(())
        product: Source = (_Product(input.source), ())
        names = [argument.name for argument in raw.overload._schema.arguments]
        active = args[names.index("activation")] != "none"
        if active:
            self.activated(product, fused=True)
        if "W" in roles:  # the second product's input is nobody else's
            return iter((_value_of(_Product((object(), ()))),))
        if roles.count("w") > 1:
            if active:
                self.count(GATE, fused=True)
            return iter(())
        return iter((_Value(product, product=product, active=active),))

    def operator(self, call: _Call) -> Iterator[_Value]:
        """What the outputs of an operator of another library are, after it has been counted."""
        name, values = call.name, call.values
        if name in _PRODUCTS:
            return iter((self.product(call),))
        if name == "native_layer_norm":
            self.norm(LAYER_NORM, values[0])
        elif name == "_fused_rms_norm":
            self.norm(RMS_NORM, values[0])
        elif name == "_softmax":  # inside scaled_dot_product_attention it is _safe_softmax
            self.count(SOFTMAX)
        elif name == _ENCODER_LAYER:
            self.encoder_layer(call)
        elif name == "bernoulli":
            return iter((_new(noise=True),))
        elif not values or any(mark in name for mark in _SHAPED_LIKE) or (name in _GATHERS and values[0].weight):
            return _all(call.out, weight=True)
        elif name in ("mean", "var", "std", "var_mean", "linalg_vector_norm"):
            return _statistic(call)
        elif name in _SAME:
            return iter((values[0],))
        elif call.func.is_view or name in _PARTS:
            return _views(call)
        elif call.pointwise:
            return iter((self.norm_step(call) or self.elementwise(call),))
        return _all(call.out, weight=all(v.weight for v in values))

    def product(self, call: _Call) -> _Value:
        """A product of an input with a weight, or of two computed tensors, which is none that a Linear makes."""
        first = _PRODUCTS[call.name]
        matrices = [self.value(a) for a in call.args[first : first + 2] if isinstance(a, Tensor)]
        inputs = [v for v in matrices if not v.weight] or matrices[:1]
        return _value_of(_Product(inputs[0].source)) if len(inputs) == 1 else _new()

    def encoder_layer(self, call: _Call) -> None:
        norm_first = call.args[[argument.name for argument in call.func._schema.arguments].index("norm_first")]
        self.count(LINEAR)
        for added in (not norm_first, True):
            self.norm(LAYER_NORM, _new(added=added))

    def norm_step(self, call: _Call) -> _Value | None:
        """The steps of a norm that is written out: x less its mean, squares, their mean, its root, x times or over that."""
        name, operands = call.name, call.operands()
        if not operands or operands[0].weight:
            return None
        x, other, number = operands[0], operands[-1], call.scalar()
        if name == "sub" and other.step == "mean" and other.of == x.source:
            return _new(centered=x.source, added=x.added)
        if (name == "pow" and number == 2) or name == "square" or (name == "mul" and len(operands) == 2 and x is other):
            return replace(self.elementwise(call), step="square", of=x.centered or x.source)
        if len(operands) == 1 and x.step in ("variance", "root", "length"):
            if name in ("rsqrt", "reciprocal") or (name == "pow" and number == -0.5):
                return replace(x, source=(object(), ()), step="inverse")
            if name == "sqrt" or (name == "pow" and number == 0.5) or (x.step == "length" and name in ("mul", "div")):
                return replace(x, source=(object(), ()), step="root")
            return replace(x, source=(object(), ()))
        if len(operands) == 2 and name in ("mul", "div"):
            if name == "mul" and x.step == "inverse":
                x, other = other, x
            if other.step == ("inverse" if name == "mul" else "root") and other.of in (x.source, x.centered):
                self.norm(LAYER_NORM if x.centered else RMS_NORM, x)
                return _new()
        return None

    def elementwise(self, call: _Call) -> _Value:
        """A function of one product stays one through numbers, biases and dropout; two of them multiplied are a gate."""
        name, operands = call.name, call.operands()
        products = {v.product for v in operands if v.product is not None}
        if len(products) == 1:
            passes = all(
                v.product or (v.weight and name in ("add", "sub", "_prelu_kernel")) or (v.noise and name == "mul")
                for v in operands
            )
            if passes:
                return self.function_of(call, next(iter(products)), any(v.active for v in operands))
        elif len(products) == 2 and name == "mul" and len(operands) == 2:
            one, two = (made for made, _ in products)
            same_input = isinstance(one, _Product) and isinstance(two, _Product) and one.input == two.input
            if same_input and operands[0].active != operands[1].active:
                self.count(GATE)
        computed = [v for v in operands if not v.weight and not v.noise]
        return _new(
            weight=not computed and not any(v.noise for v in operands),
            added=name in ("add", "sub") and len(computed) == 2,
            noise=not computed and any(v.noise for v in operands),
        )

    def function_of(self, call: _Call, product: Source, active: bool) -> _Value:
        rectifies = call.name in ("clamp_min", "clamp") and call.scalar() == 0 and len(call.args) == 2
        if call.name in _ACTIVATIONS or rectifies:
            active = True
            self.activated(product)
            if call.name == "glu":
                self.count(GATE)
                return _new()
        return _new(product=product, active=active)


def _value_of(product: _Product) -> _Value:
    return _Value((product, ()), product=(product, ()))


def _outputs(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _all(out: Any, **what: Any) -> Iterator[_Value]:
    return (_new(**what) for _ in _outputs(out))


def _views(call: _Call) -> Iterator[_Value]:
    """A view of all elements is the same value; of some of them, a part of it."""
    outputs, whole = _outputs(call.out), call.values[0]
    key = (call.name, repr([a for a in call.args if not isinstance(a, Tensor)]))
    for i, output in enumerate(outputs):
        yield whole if output.numel() >= call.tensors[0].numel() else whole.part(*key, i)


def _statistic(call: _Call) -> Iterator[_Value]:
    """A mean or the like over one dimension, which may be a step of a norm."""
    name, x = call.name, call.values[0]
    dims = next((a for a in call.args[1:] if isinstance(a, (list, tuple))), ())
    if x.weight or len(dims) != 1:
        return _all(call.out, weight=x.weight)
    of, variance = x.source, _new(step="variance", of=x.source)
    if name == "mean":
        return iter((_new(step="variance", of=x.of) if x.step == "square" else _new(step="mean", of=of),))
    if name == "var_mean":
        return iter((variance, _new(step="mean", of=of)))
    return iter((variance if name == "var" else _new(step="root" if name == "std" else "length", of=of),))


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the random generators and the model's buffers back what they had."""
    held = [(module, dict(module._buffers.items())) for module in model.modules()]
    buffers = {id(b): b for _, found in held for b in found.values() if b is not None and not nn.parameter.is_lazy(b)}
    saved = [(b, b.detach().clone()) for b in buffers.values() if not b.is_inference() and not b.is_meta]
    cuda = {t.get_device() for t in (*model.parameters(), *buffers.values()) if t.is_cuda}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=sorted(cuda)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for module, found in held:
            for name, buffer in found.items():
                if module._buffers[name] is not buffer and not isinstance(module, torch.jit.ScriptModule):
                    module._buffers[name] = buffer
        for buffer, before in saved:
            if not torch.equal(buffer, before):  # versions do not tell: batch norm raises none
                buffer.copy_(before)


def count(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """What one forward of model computes, by kind: {kind: (computed by a fused operator, all)}.

    Runs model(*args, **kwargs) once, without gradients and in the training mode that each module has. The states of torch's,
    Python's and NumPy's random generators and the model's buffers are what they were afterwards. What else a forward changes,
    in attributes of its own, through hooks or in its arguments (a cache), stays changed.

    Kinds:
        layer_norm, rms_norm: as one operator of ATen, or written out over one dimension.
        softmax: by itself; those inside scaled_dot_product_attention and log_softmax are not counted.
        linear: a product of an input with a weight whose result goes through an activation, by way of views, casts, biases
            and numbers alone. Once a product: an activation that is written out (x * sigmoid(1.702 * x)) is one.
        gated_linear: an activation of such a product times another product of the same input, or times another part of
            the same product. Its first product is counted as a linear too, fused or not.
        add_norm: a norm of the sum of two computed tensors; it is counted as a norm too.

    Attention's products of two computed tensors and convolutions are no linear. One fused MLP is one linear.

    Raises:
        What the forward raises.
    """
    counting = _Counting(tree_leaves((args, kwargs)))
    with _restored(model), torch.no_grad(), counting:
        model(*args, **kwargs)
    return {kind: (fused, total) for kind, (fused, total) in counting.counts.items()}
