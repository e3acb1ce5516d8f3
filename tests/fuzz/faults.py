"""Arguments that are wrong, or that torch takes in a form that few people use: a table for each kind of parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from .calls import Call, Parameter, parameters
from .forms import FLOATS, Form


class Fault(NamedTuple):
    """make(value) is the argument in value's place.

    refused: the docstrings say that we refuse it, or do not say that we take it, though torch may. taken: the other way about.
    """

    make: Callable[[Any], Any]
    refused: bool = False
    taken: bool = False


def _requiring(value: Any) -> Any:
    return value.detach().requires_grad_()


FAULTS: dict[str, dict[str, Fault]] = {
    "tensor": {
        "none": Fault(lambda x: None),
        "number": Fault(lambda x: 1.0),
        "list": Fault(lambda x: [1.0]),
        "array": Fault(lambda x: np.ones(tuple(x.shape), np.float32)),
        "int32": Fault(lambda x: x.to(torch.int32), refused=True),
        "bool": Fault(lambda x: x.to(torch.bool), refused=True),
        "complex64": Fault(lambda x: x.to(torch.complex64), refused=True),
        "e5m2": Fault(lambda x: x.to(torch.float8_e5m2), refused=True),
        "e4m3": Fault(lambda x: x.to(torch.float8_e4m3fn), refused=True),
        "other_float": Fault(
            lambda x: x.to(FLOATS[(FLOATS.index(x.dtype) + 1) % 3 if x.dtype in FLOATS else 0]), refused=True, taken=True
        ),
        "float64": Fault(lambda x: x.double(), refused=True, taken=True),
        "longer": Fault(lambda x: torch.cat([x, x[..., :1]], -1), refused=True),
        "one_more_dimension": Fault(lambda x: x.unsqueeze(0), refused=True),
        "scalar": Fault(lambda x: x.new_ones(()), refused=True),
        "one": Fault(lambda x: x.new_ones((1,)), refused=True),
        "meta": Fault(lambda x: x.to("meta"), refused=True),
        "sparse": Fault(lambda x: x.to_sparse()),
        "gradient": Fault(_requiring, refused=True),
    },
    "dim": {
        "out": Fault(lambda d: 7),
        "out_below": Fault(lambda d: -9),
        "far": Fault(lambda d: 2**40),
        "beyond_int64": Fault(lambda d: 2**70),
        "none": Fault(lambda d: None, refused=True),
        "true": Fault(lambda d: True),
        "float": Fault(float),
        "string": Fault(str),
        "tuple": Fault(lambda d: (d,)),
        "numpy": Fault(np.int64),
        "tensor": Fault(torch.tensor),
        "float_tensor": Fault(lambda d: torch.tensor(float(d))),
    },
    "shape": {
        "empty": Fault(lambda s: []),
        "longer": Fault(lambda s: [*s, 3]),
        "other": Fault(lambda s: [*s[:-1], s[-1] + 1]),
        "negative": Fault(lambda s: [-1]),
        "floats": Fault(lambda s: [float(size) for size in s]),
        "true": Fault(lambda s: [True for _ in s]),
        "none": Fault(lambda s: None),
        "string": Fault(lambda s: str(s[-1])),
        "strings": Fault(lambda s: [str(size) for size in s]),
        "nested": Fault(lambda s: [list(s)]),
        "numpy": Fault(lambda s: [np.int64(size) for size in s]),
        "array": Fault(np.array),
        "tensor": Fault(lambda s: torch.ones(s or (1,))),
        "long_tensor": Fault(lambda s: torch.ones(3000)),
        "tensors": Fault(lambda s: [torch.tensor(size) for size in s]),
        "float": Fault(lambda s: float(s[-1])),
        "beyond_int64": Fault(lambda s: [2**70]),
    },
    "eps": {
        "none": Fault(lambda e: None),
        "string": Fault(lambda e: "1e-5"),
        "list": Fault(lambda e: [1e-5]),
        "complex": Fault(lambda e: 1e-5j),
        "true": Fault(lambda e: True),
        "numpy": Fault(lambda e: np.float64(1e-5)),
        "numpy32": Fault(lambda e: np.float32(1e-5)),
        "tensor": Fault(lambda e: torch.tensor(1e-5)),
        "tensor_with_gradient": Fault(lambda e: torch.tensor(1e-5, requires_grad=True)),
        "long_tensor": Fault(lambda e: torch.ones(3000)),
        "nan": Fault(lambda e: float("nan")),
        "infinite": Fault(lambda e: float("inf")),
        "huge": Fault(lambda e: 10**400),
    },
    "name": {
        "unknown": Fault(lambda a: "swish"),
        "capitals": Fault(lambda a: "RELU"),
        "empty": Fault(lambda a: ""),
        "long": Fault(lambda a: "relu" * 500),
        "none": Fault(lambda a: "none"),
        "number": Fault(lambda a: 3),
        "list": Fault(lambda a: ["relu"]),
        "bytes": Fault(lambda a: b"relu"),
        "function": Fault(lambda a: torch.relu),
        "tensor": Fault(lambda a: torch.ones(3000)),
    },
    "dtype": {
        "int32": Fault(lambda d: torch.int32, refused=True),
        "complex64": Fault(lambda d: torch.complex64, refused=True),
        "string": Fault(lambda d: "float32"),
        "type": Fault(lambda d: float),
        "number": Fault(lambda d: 5),
        "tensor": Fault(lambda d: torch.ones(3000)),
        "none": Fault(lambda d: None, refused=True),
    },
    "flag": {
        "number": Fault(lambda f: 1, refused=True),
        "none": Fault(lambda f: None, refused=True),
        "string": Fault(lambda f: "yes", refused=True),
        "tensor": Fault(lambda f: torch.ones(3), refused=True),
    },
}


def applies(name: str, parameter: Parameter, call: Call) -> bool:
    """Whether a fault means something for this argument of this call."""
    if parameter.kind == "eps":
        return name != "none" or not parameter.optional
    if parameter.kind == "dtype":
        return name != "none" or not parameter.optional
    if parameter.kind != "tensor":
        return True
    if name == "none":
        return not parameter.optional
    if name == "gradient":
        return not call.spec.trains and parameter.dtype is not torch.float8_e4m3fn
    if name == "sparse":
        return parameter.dtype is not torch.float8_e4m3fn
    if name == "longer":
        return len(call.shape_of(parameter)) > 0
    return True


def with_fault(call: Call) -> dict[str, Any]:
    """The arguments of a call, the wrong one among them."""
    assert call.fault is not None
    (name, fault), arguments = call.fault, call.build()
    parameter = next(p for p in parameters(call.op) if p.name == name)
    value = arguments[name]
    if parameter.kind == "tensor" and value is None:
        form = next(form for form in call.tensors.values() if form is not None)
        dtype = form.dtype if form.dtype in FLOATS else torch.float32
        value = Form(dtype).build(call.shape_of(parameter))
    elif parameter.kind == "shape":
        value = list(call.inner)
    arguments[name] = FAULTS[parameter.kind][fault].make(value)
    return arguments


def fault_of(call: Call) -> Fault:
    """The fault of a call that has one."""
    assert call.fault is not None
    name, fault = call.fault
    return FAULTS[next(p.kind for p in parameters(call.op) if p.name == name)][fault]
