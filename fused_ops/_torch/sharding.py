"""How the ops shard under torch.distributed.tensor: strategies for every raw operator, forward and backward.

They are registered at the first call with a DTensor. Tensor parallelism (parallelize_module) and FSDP2 (fully_shard) then
work on fused modules as on torch.nn's. What is allowed follows from the roles of an operator's tensors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from .spec import REGISTRY, Raw, Roles

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
        _register(raw)


def _register(raw: Raw) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    overload = raw.overload
    arguments = overload._schema.arguments
    register_sharding(overload)(functools.partial(_shardings, raw))
    # DTensor caches a decision by the tensors and by the arguments from static_argnum on. Ours changes with every one of
    # them (save_pre, need_dx), so all that are no tensors have to be in the key.
    first = next((i for i, a in enumerate(arguments) if "Tensor" not in str(a.type)), len(arguments))
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload].static_argnum = first


def _shardings(raw: Raw, *args: Any) -> list[tuple[list[Any], list[Any]]]:
    """Every (output placements, input placements) that one mesh dimension allows."""
    from torch.distributed.tensor import Replicate

    roles = raw.roles_of(args)
    inputs, outputs = roles.inputs.split(), roles.outputs.split()
    tensors = [hasattr(a, "ndim") for a in args]
    found: list[tuple[list[Any], list[Any]]] = [([Replicate()] * len(outputs), [Replicate() if t else None for t in tensors])]
    for as_input, as_output in _rules(roles, args):
        placed = [as_output[o[0]] if not o[1:] or args[int(o[1:])] else Replicate() for o in outputs]
        found.append((placed, [as_input[role] if t else None for role, t in zip(inputs, tensors)]))
    return found


def _rules(roles: Roles, args: tuple[Any, ...]) -> Iterator[_Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if "q" in roles.inputs:
        return
    last = args[0].ndim - 1
    kept = last if roles.dim is None else args[roles.dim]
    for dim in range(args[0].ndim):
        if dim != kept:
            rows: dict[str, Any] = dict.fromkeys("xyzs", Shard(dim))
            yield rows | dict.fromkeys("wbWBv", Replicate()), rows | dict.fromkeys("wbWBv", Partial())
    if roles.multiplies:  # column-parallel; the MLP's second weight by rows
        columns: dict[str, Any] = {"w": Shard(0), "b": Shard(0), "y": Shard(last), "W": Shard(1)}
        yield columns | {"x": Replicate(), "z": Replicate(), "B": Partial()}, columns | {
            "x": Partial(), "z": Partial(), "B": Replicate(),
        }  # fmt: skip
    if roles.sums is not None and roles.sums(*args):  # row-parallel
        parts: dict[str, Any] = {"x": Shard(last), "w": Shard(1)}
        yield parts | {"y": Replicate(), "b": Partial()}, parts | {"y": Partial(), "b": Replicate()}
