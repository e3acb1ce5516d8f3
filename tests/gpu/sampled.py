"""The numerics contract on some rows of each output: for products whose fp64 reference, taken whole, is too large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import Op, Raw, assert_within_contract

SAMPLE = 64
TILES = (16, 32, 64, 128, 256)  # whose edges are among the rows

Pick = Callable[[tuple[Tensor, ...]], tuple[Tensor | None, ...]]
"""From the outputs of the whole call, those of a smaller call."""


def sample(size: int) -> list[int]:
    """Up to SAMPLE indices below size: both ends, the edges of tiles at both ends and in the middle, and others."""
    middle = size // 2 // 256 * 256
    edges = [i for tile in TILES for i in (tile - 1, tile, middle + tile - 1, middle + tile, size - tile - 1, size - tile)]
    wanted = [0, size - 1, *edges]
    spread = torch.randperm(size, generator=torch.Generator().manual_seed(1))[: 2 * SAMPLE].tolist()
    found = [i for i in dict.fromkeys((*wanted, *spread)) if 0 <= i < size]
    return sorted(found[:SAMPLE])


@dataclass(frozen=True)
class Way:
    """How operands are cut, each role along a dimension (what is not named stays whole), and the roles of the outputs that a
    call on what is left computes."""

    cut: dict[str, int]
    outputs: frozenset[str]


BY_ROWS = Way(dict.fromkeys("xyzs", 0), frozenset("xyzs"))
BY_COLUMNS = Way({"y": -1, "w": 0, "b": 0, "W": -1}, frozenset("ywbWB"))  # of a product, y's
BY_WIDTH = Way({"x": -1, "v": 0}, frozenset("v"))  # of a norm, x's: its sums over rows


def smaller_calls(raw: Raw, args: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Pick]]:
    """Calls of a raw operator on some rows, or some columns, of its arguments, each with what it should give of the outputs
    of the whole call. Arguments are 2-D, as in benchmark cases. What may be cut follows from their roles."""
    roles = raw.roles_of(args)
    inputs, outputs = roles.inputs.split(), roles.outputs.split()
    produced = {output[0] for output in outputs}
    ways = [BY_ROWS]
    if not raw.forward and produced & set("wbWB"):
        ways.append(BY_COLUMNS)
    if not raw.forward and "v" in produced:
        ways.append(BY_WIDTH)
    for way in ways:
        if any(output[0] in way.outputs and _needed(output, args) for output in outputs):
            yield _cut(way, inputs, outputs, args), functools.partial(_pick, way, outputs, inputs, args)


def _needed(output: str, args: tuple[Any, ...]) -> bool:
    """Whether the call computes the output: the argument that its role points at says so."""
    return not output[1:] or bool(args[int(output[1:])])


def _indices(way: Way, inputs: list[str], args: tuple[Any, ...]) -> list[int]:
    """What is sampled of the dimension that is cut."""
    given = [(a, role) for a, role in zip(args, inputs) if isinstance(a, Tensor) and a.numel()]
    return sample(next(a.shape[way.cut[role]] for a, role in given if role in way.cut))


def _cut(way: Way, inputs: list[str], outputs: list[str], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the smaller call: outputs that it does not have are not asked for."""
    chosen, scales = _indices(way, inputs, args), 0
    smaller = list(args)
    for i, (argument, role) in enumerate(zip(args, inputs)):
        if isinstance(argument, Tensor) and argument.numel():
            dim = way.cut.get(role)
            if role == "q":  # the first scale is x's: one number, or one a row
                dim = 0 if scales == 0 and argument.numel() > 1 else None
                scales += 1
            if dim is not None:
                smaller[i] = argument.index_select(dim, torch.tensor(chosen, device=argument.device))
    for output in outputs:
        if output[1:] and output[0] not in way.outputs:
            smaller[int(output[1:])] = False
    return tuple(smaller)


def _pick(
    way: Way, outputs: list[str], inputs: list[str], args: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """From the outputs of the whole call, those of the smaller one."""
    chosen = _indices(way, inputs, args)
    picked: list[Tensor | None] = []
    for role, result in zip(outputs, results):
        dim = way.cut.get(role[0])
        if not _needed(role, args) or role[0] not in way.outputs:
            picked.append(None)
        else:
            picked.append(result if dim is None else result.index_select(dim, torch.tensor(chosen, device=result.device)))
    return tuple(picked)


class SampledContract(TorchDispatchMode):
    """While active, every raw operator of fused_ops that runs is held to the contract on the rows and columns of
    `smaller_calls`, and gives the same bits on a second run. checked: their names."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[str] = []
        self._raws = {raw.overload: raw for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in self._raws:
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        again = func(*args, **(kwargs or {}))
        for i, (out, second) in enumerate(zip(outputs, again if isinstance(again, tuple) else (again,))):
            same = torch.equal(out.view(torch.uint8), second.view(torch.uint8)) if out.numel() else True
            assert same, f"{func} output {i} differs between two runs on the same arguments"
        del again
        for call, pick in smaller_calls(self._raws[func], args):
            bounds, picked = self._raws[func].bound(*call), pick(outputs)
            assert len(bounds) == len(picked)
            for i, (out, expected) in enumerate(zip(picked, bounds)):
                if out is not None:
                    assert expected is not None, f"{func} output {i}: no bound"
                    assert_within_contract(out, expected, f"{func} output {i}, sampled")
        self.checked.append(str(func))
        return result


def hold_sampled(spec: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the public function, and backward, in SampledContract."""
    trains = spec.trains
    args = tuple(a.requires_grad_() if trains and isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with SampledContract() as mode:
        out = spec.public(*args, **kwargs)
        assert str(spec.fwd) in mode.checked
        if trains:
            leaves = [a for a in args if isinstance(a, Tensor)]
            grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
            assert str(spec.bwd) in mode.checked
            assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
