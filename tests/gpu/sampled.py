"""The numerics contract on some rows of each output: for products whose fp64 reference, taken whole, is too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops._torch.spec import REGISTRY, Op
from fused_ops.testing import assert_within_contract

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


def smaller_calls(op: str, args: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Pick]]:
    """Calls of a raw operator on some rows, or some columns, of its arguments, each with what it should give of the outputs
    of the whole call. Arguments are 2-D, as in benchmark cases. op: the operator's name, such as linear_bwd."""
    rows = sample(args[0].shape[0])
    if op in ("linear_fwd", "gated_linear_fwd", "mlp_fwd", "layer_norm_fwd", "layer_norm_fp8_fwd", "softmax_fwd"):
        yield (args[0][rows], *args[1:]), lambda outs: tuple(o[rows] if o.numel() else None for o in outs)
    elif op == "linear_fp8_fwd":
        x, weight, input_scale, *rest = args
        scale = input_scale if input_scale.numel() == 1 else input_scale.reshape(-1)[rows]
        yield (x[rows], weight, scale, *rest), lambda outs: (outs[0][rows],)
    elif op == "softmax_bwd":
        yield (args[0][rows], args[1][rows], *args[2:]), lambda outs: (outs[0][rows],)
    elif op == "layer_norm_bwd":
        dy, x, weight, mean, rstd, need_dx, need_dw, need_db, bias_dtype = args
        some = (dy[rows], x[rows], weight, mean[rows], rstd[rows])
        yield (*some, need_dx, False, False, bias_dtype), lambda outs: (outs[0][rows], None, None)
        columns = sample(x.shape[1])
        part = (dy[:, columns], x[:, columns], None if weight is None else weight[columns], mean, rstd)
        yield (*part, False, need_dw, need_db, bias_dtype), lambda outs: (None, *(o[columns] for o in outs[1:]))
    elif op == "linear_bwd":
        dy, x, weight, saved, activation, need_dx, need_dw, need_db = args
        columns = sample(dy.shape[1])
        some, part = (saved[rows], saved[:, columns])
        if need_dx:
            yield (
                (dy[rows], x[rows], weight, some, activation, True, False, False),
                lambda outs: (outs[0][rows], None, None),
            )
        if need_dw or need_db:
            w = None if weight is None else weight[columns]
            yield (
                (dy[:, columns], x, w, part, activation, False, need_dw, need_db),
                lambda outs: (None, outs[1][columns] if need_dw else None, outs[2][columns] if need_db else None),
            )
    elif op == "gated_linear_bwd":
        dy, x, wg, wu, g, u, activation, *needs = args
        columns = sample(dy.shape[1])
        yield (
            (dy[rows], x[rows], wg, wu, g[rows], u[rows], activation, needs[0], False, False, False, False),
            lambda outs: (outs[0][rows] if needs[0] else None, None, None, None, None),
        )
        yield (
            (dy[:, columns], x, wg[columns], wu[columns], g[:, columns], u[:, columns], activation, False, *needs[1:]),
            lambda outs: (None, *(o[columns] if need else None for o, need in zip(outs[1:], needs[1:]))),
        )
    elif op == "mlp_bwd":
        dy, weight2, saved, h, activation, need_dpre, need_db1, need_dw2, need_db2 = args
        columns = sample(weight2.shape[1])  # of the hidden layer
        stored = h.numel() == saved.numel()
        yield (
            (dy[rows], weight2, saved[rows], h[rows] if stored else h, activation, need_dpre, False, False, False),
            lambda outs: (outs[0][rows] if need_dpre else None, None, None, None),
        )
        part = (dy, weight2[:, columns], saved[:, columns], h[:, columns] if stored else h, activation)
        yield (
            (*part, False, need_db1, need_dw2, need_db2),
            lambda outs: (
                None, outs[1][columns] if need_db1 else None, outs[2][:, columns] if need_dw2 else None,
                outs[3] if need_db2 else None,
            ),
        )  # fmt: skip
    else:
        raise NotImplementedError(f"no smaller call of {op} is known")


class SampledContract(TorchDispatchMode):
    """While active, every raw operator of fused_ops that runs is held to the contract on the rows and columns of
    `smaller_calls`, and gives the same bits on a second run. checked: their names."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[str] = []
        self._bounds = {raw.overload: raw.bound for op in REGISTRY.values() for raw in op.raw}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in self._bounds:
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        again = func(*args, **(kwargs or {}))
        for i, (out, second) in enumerate(zip(outputs, again if isinstance(again, tuple) else (again,))):
            same = torch.equal(out.view(torch.uint8), second.view(torch.uint8)) if out.numel() else True
            assert same, f"{func} output {i} differs between two runs on the same arguments"
        del again
        name = func._schema.name.partition("::")[2]
        for call, pick in smaller_calls(name, args):
            bounds, picked = self._bounds[func](*call), pick(outputs)
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
