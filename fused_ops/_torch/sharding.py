"""How the ops shard under torch.distributed.tensor: strategies for every raw operator, forward and backward.

They are registered at the first call with a DTensor. Tensor parallelism (parallelize_module) and FSDP2 (fully_shard) then
work on fused modules as on torch.nn's. An operator without an entry in ROLES runs on replicated tensors: always right, at
the price of communication.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from .spec import REGISTRY

# operator -> (a role for each argument, a role for each output). "-" is an argument that is no tensor. Tensors of one role are
# sharded alike, gradients like the tensor they are of:
#   x  (..., K)  the input                             s  (...)   one number a row: a statistic, a scale
#   y  (..., N)  the first product, what is saved of it
#   z  (..., N)  the second product, of an MLP
#   w, b         (N, K), (N,)  weight and bias of y    W, B       weight and bias of z
#   v            (K,)  a norm's weight or bias
# "y4": an output that is empty unless argument 4 is true; an empty one is replicated.
ROLES: dict[str, tuple[str, str]] = {
    "softmax_fwd": ("x - -", "x"),
    "softmax_bwd": ("x x - -", "x"),
    "layer_norm_fwd": ("x v v -", "x s s"),
    "layer_norm_bwd": ("x x v s s - - - -", "x5 v6 v7"),
    "layer_norm_fp8_fwd": ("x v v -", "x s"),
    "linear_fwd": ("x w b - -", "y y4"),
    "linear_bwd": ("y x w y - - - -", "x5 w6 b7"),
    "gated_linear_fwd": ("x w w b b - -", "y y6 y6"),
    "gated_linear_bwd": ("y x w w y y - - - - - -", "x7 w8 w9 b10 b11"),
    "mlp_fwd": ("x w b W B - - -", "z y6 y7"),
    "mlp_bwd": ("z W y y - - - - -", "y5 b6 W7 B8"),
    "linear_bwd, the activation's step": ("y y - y - - - -", "y5 w6 b7"),
}

_Rule = tuple[dict[str, Any], dict[str, Any]]  # the placement of each role as an input, and as an output


def register_when_used() -> None:
    """Register the strategies if torch.distributed.tensor has been imported."""
    if "torch.distributed.tensor" in sys.modules:
        register()


register_when_used._dynamo_marked_constant = True  # type: ignore[attr-defined]  # under Dynamo: run while tracing


@functools.cache
def register() -> None:
    """Register the sharding strategies of every raw operator with DTensor, once.

    Imports torch.distributed.tensor, which takes 0.8 s.
    """
    for raw in [raw for op in REGISTRY.values() for raw in op.raw]:
        _register(raw.name, raw.overload)


def _register(name: str, overload: Any) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    arguments = overload._schema.arguments
    register_sharding(overload)(functools.partial(_shardings, name, len(overload._schema.returns)))
    # DTensor caches a decision by the tensors and by the arguments from static_argnum on. Ours changes with every one of
    # them (save_pre, need_dx), so all that are no tensors have to be in the key.
    first = next((i for i, a in enumerate(arguments) if "Tensor" not in str(a.type)), len(arguments))
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload].static_argnum = first


def _shardings(name: str, returns: int, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    """Every (output placements, input placements) that one mesh dimension allows."""
    from torch.distributed.tensor import Replicate

    tensors = [hasattr(a, "ndim") for a in args]
    found = [([Replicate()] * returns, [Replicate() if t else None for t in tensors])]
    if name not in ROLES:
        return found
    if name == "linear_bwd" and args[2] is None:
        name = "linear_bwd, the activation's step"
    inputs, outputs = (roles.split() for roles in ROLES[name])
    for as_input, as_output in _rules(name, args):
        placed = [as_output[o[0]] if not o[1:] or args[int(o[1:])] else Replicate() for o in outputs]
        found.append((placed, [as_input[role] if t else None for role, t in zip(inputs, tensors)]))
    return found


def _rules(name: str, args: tuple[Any, ...]) -> Iterator[_Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = args[0].ndim - 1
    kept = args[1 if name == "softmax_fwd" else 2] if name.startswith("softmax") else last  # what no shard may cut
    for dim in range(args[0].ndim):
        if dim != kept:
            rows: dict[str, Any] = dict.fromkeys("xyzs", Shard(dim))
            yield rows | dict.fromkeys("wbWBv", Replicate()), rows | dict.fromkeys("wbWBv", Partial())
    if name.startswith(("linear", "gated_linear", "mlp")):  # column-parallel; the MLP's second weight by rows
        columns: dict[str, Any] = {"w": Shard(0), "b": Shard(0), "y": Shard(last), "W": Shard(1)}
        yield columns | {"x": Replicate(), "z": Replicate(), "B": Partial()}, columns | {
            "x": Partial(), "z": Partial(), "B": Replicate(),
        }  # fmt: skip
    if name == "linear_bwd" or (name == "linear_fwd" and args[3] == "none"):  # row-parallel: no activation on partial sums
        parts: dict[str, Any] = {"x": Shard(last), "w": Shard(1)}
        yield parts | {"y": Replicate(), "b": Partial()}, parts | {"y": Partial(), "b": Replicate()}
