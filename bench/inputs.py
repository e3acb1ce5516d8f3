"""Arguments to time with: fresh random numbers, several sets of them, so that each call finds its inputs outside L2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tasks import Task

MAX_SETS = 256


@dataclass(frozen=True)
class Arguments:
    """One set: the public function's arguments, and a dy for each output for the passes that go backward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dy: tuple[Tensor, ...] = ()

    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken for."""
        values = (*self.args, *self.kwargs.values())
        return [a for a in values if isinstance(a, Tensor) and a.requires_grad]


def l2_bytes(device: str) -> int:
    """The size of the GPU's L2 cache; 0 on a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0


def sets_needed(task: Task, device: str) -> tuple[int, bool]:
    """(number of argument sets, whether they hold at least twice as many bytes as L2 together, so that calls are cold)."""
    moved = max(task.spec.bench.bytes(task.case)[0], 1)
    l2 = l2_bytes(device)
    sets = min(max(2, -(-3 * l2 // moved)), MAX_SETS) if l2 else 1
    return sets, sets * moved >= 2 * l2


def memory_needed(task: Task, sets: int) -> int:
    """Bytes of device memory that timing the task takes, estimated: every set with outputs and gradients, and the check."""
    fwd, bwd = task.spec.bench.bytes(task.case)
    each = 2 * fwd if task.pass_ in ("fwd", "train_fwd") else 2 * (fwd + bwd)
    check = 2 * fwd * 4 // task.case.dtype.itemsize  # the reference, kept in fp32
    return sets * each + 2 * check + (2 << 30)


def argument_sets(task: Task, sets: int, device: str) -> list[Arguments]:
    """sets sets of arguments. Inputs are drawn anew for each; parameters are copies of one draw, because a provider that
    freezes them into a module or an engine must be right on every set.
    """
    names = list(inspect.signature(task.spec.public).parameters)
    first: dict[str, Tensor] = {}
    result = []
    for _ in range(sets):
        args, kwargs = task.case.make(device)
        values = dict(zip(names, args)) | kwargs
        for name, value in values.items():
            if isinstance(value, Tensor) and is_parameter(name):
                values[name] = first.setdefault(name, value.detach()).clone()
        if task.pass_ != "fwd":
            values = {k: _leaf(v) for k, v in values.items()}
        result.append(_with_dy(task, tuple(values[n] for n in names[: len(args)]), {k: values[k] for k in kwargs}))
    return result


def is_parameter(name: str) -> bool:
    """Whether an argument of a public function is a module's parameter (weight, gate_bias) rather than its input."""
    return "weight" in name or "bias" in name


def _leaf(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value


def _with_dy(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if task.pass_ in ("fwd", "train_fwd"):
        return Arguments(args, kwargs)
    device = next(a.device for a in args if isinstance(a, Tensor))
    shapes = outputs(call_on(task.spec.torch_fn, lambda t: t.detach().to("meta"), args, kwargs))
    return Arguments(args, kwargs, tuple(torch.randn(o.shape, dtype=o.dtype, device=device) for o in shapes))


def call_on(
    function: Callable[..., Any], change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """function(*args, **kwargs) with change applied to every tensor."""
    new = {k: change(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return function(*(change(a) if isinstance(a, Tensor) else a for a in args), **new)


def outputs(result: Any) -> tuple[Tensor, ...]:
    """A function's outputs as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(r for r in result if isinstance(r, Tensor))
