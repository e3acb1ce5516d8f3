"""What each process of test_distributed.py runs: every check, on a gloo group over the loopback, its outcome noted."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops import REGISTRY, fused_layernorm, fused_linear, fused_softmax
from fused_ops._torch import sharding
from fused_ops.nn import FusedLayerNorm, FusedLinear
from fused_ops.testing import roles_of
from tests.torch.calls import CALLS, Call

BATCH, TOKENS, WIDTH, HEADS = 4, 8, 16, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (FusedLinear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = fused_softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = FusedLayerNorm(WIDTH), Attention()
        self.norm2, self.up = FusedLayerNorm(WIDTH), FusedLinear(WIDTH, 4 * WIDTH, activation="gelu")
        self.down = FusedLinear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.up(self.norm2(x)))


def encoder() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(Layer(), Layer()).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def train(model: nn.Module, place: Callable[[Tensor], Tensor], steps: int = 2) -> list[Tensor]:
    """Outputs of a few steps of SGD, whole on every process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        out = model(place(batch(step)))
        whole = out.full_tensor() if isinstance(out, DTensor) else out
        whole.square().mean().backward()
        optimizer.step()
        outputs.append(whole.detach())
    return outputs


def compare_parameters(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, q, msg=lambda m, name=name: f"{name}: {m}")


def tensor_parallel(world: int) -> None:
    """Colwise, Rowwise and SequenceParallel on every layer."""
    mesh = init_device_mesh("cpu", (world,))
    one, many = encoder(), encoder()
    gathered = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    plan: dict[str, Any] = {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "attention": gathered, "up": gathered}
    plan |= {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    plan |= {"attention.out": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)}
    plan |= {"up": ColwiseParallel(input_layouts=Shard(1))}
    plan |= {"down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)}
    for layer in many:
        parallelize_module(layer, mesh, plan)
    expected = train(one, lambda x: x)
    for got, want in zip(train(many, lambda x: distribute_tensor(x, mesh, [Shard(1)])), expected):
        torch.testing.assert_close(got, want)
    compare_parameters(many, one)


def fsdp2(world: int) -> None:
    """fully_shard on every layer and the whole: each process trains on its part of the batch."""
    one, many = encoder(), encoder()
    for layer in many:
        fully_shard(layer)
    fully_shard(many)
    part = BATCH // world
    rank = dist.get_rank()
    expected = train(one, lambda x: x)
    outputs = train(many, lambda x: x[rank * part : (rank + 1) * part])
    for got, want in zip(outputs, expected):
        torch.testing.assert_close(got, want[rank * part : (rank + 1) * part])
    compare_parameters(many, one)


def operator(world: int) -> None:
    """Each op on each sharding that needs no communication in the forward: right, and with none."""
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, n, w, v, b, u = r(4, 8, 12), r(12), r(16, 12), r(12), r(16), r(16, 12)
    w2, b2 = r(12, 16), r(12)
    S, R = Shard, Replicate()
    calls: list[tuple[Any, list[tuple[Tensor | None, Any]], Any]] = [
        (lambda x, n, v: fused_layernorm(x, (12,), n, v), [(x, S(0)), (n, R), (v, R)], S(0)),
        (lambda x, n, v: fused_layernorm(x, (12,), n, v), [(x, S(1)), (n, R), (v, R)], S(1)),
        (lambda x: fused_layernorm(x, (12,)), [(x, S(1))], S(1)),
        (lambda x: fused_softmax(x, 1), [(x, S(0))], S(0)),
        (lambda x: fused_softmax(x, 1), [(x, S(2))], S(2)),
        (fused_softmax, [(x, S(1))], S(1)),
        (lambda x, w, b: fused_linear(x, w, b, "gelu"), [(x, S(0)), (w, R), (b, R)], S(0)),
        (lambda x, w, b: fused_linear(x, w, b, "relu"), [(x, R), (w, S(0)), (b, S(0))], S(2)),
        (lambda x, w: fused_linear(x, w, None, "silu"), [(x, R), (w, S(0))], S(2)),
        (lambda x, w, b: fused_linear(x, w, b), [(x, S(2)), (w, S(1)), (b, R)], None),
        (lambda x, w: fused_linear(x, w), [(x, S(2)), (w, S(1))], None),
    ]
    if hasattr(fused_ops, "fused_gated_linear"):
        gated = fused_ops.fused_gated_linear
        calls.append((lambda x, w, u: gated(x, w, u), [(x, S(1)), (w, R), (u, R)], S(1)))
        calls.append((lambda x, w, u: gated(x, w, u), [(x, R), (w, S(0)), (u, S(0))], S(2)))
    if hasattr(fused_ops, "fused_mlp"):
        mlp = fused_ops.fused_mlp
        weights = [(w, R), (b, R), (w2, R), (b2, R)]
        calls.append((lambda x, *p: mlp(x, *p, "gelu"), [(x, S(0)), *weights], S(0)))
        calls.append((lambda x, *p: mlp(x, *p, "gelu"), [(x, R), (w, S(0)), (b, S(0)), (w2, S(1)), (b2, R)], None))
    for i, (function, arguments, kept) in enumerate(calls):
        local = [t.clone().requires_grad_() for t, _ in arguments]  # type: ignore[union-attr]
        placed = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, (_, p) in zip(local, arguments)]
        with torch.no_grad():  # the same shapes with other outputs first: DTensor caches decisions
            torch.testing.assert_close(function(*placed).full_tensor(), function(*local))
        with CommDebugMode() as communication:
            out = function(*placed)
        assert communication.get_total_counts() == 0, f"call {i}: {communication.get_comm_counts()}"
        assert out.placements[0].is_partial() if kept is None else out.placements == (kept,), f"call {i}: {out.placements}"
        expected = function(*local)
        torch.testing.assert_close(out.full_tensor(), expected)
        out.full_tensor().square().sum().backward()
        expected.square().sum().backward()
        for j, (got, want) in enumerate(zip(placed, local)):
            torch.testing.assert_close(
                got.grad.full_tensor(), want.grad, msg=lambda m, i=i, j=j: f"call {i}, gradient {j}: {m}"
            )  # type: ignore[union-attr]
        for j in range(len(local)):  # each gradient alone
            out = function(*(t.detach().requires_grad_(k == j) for k, t in enumerate(placed)))
            assert out.requires_grad
            leaf = placed[j].detach().requires_grad_()
            function(*(leaf if k == j else t.detach() for k, t in enumerate(placed))).full_tensor().square().sum().backward()
            torch.testing.assert_close(leaf.grad.full_tensor(), local[j].grad)  # type: ignore[union-attr]


def placements(call: Call, mesh: Any) -> Iterator[tuple[list[Any], Any]]:
    """Every (placements of the tensors, placement of the result) that one dimension of the mesh allows, by the roles' rules."""
    args: list[tuple[Any, ...]] = []
    with torch.no_grad(), Noted(call.op.fwd, args):
        call.ours(*call.tensors(torch.float64))
    (raw,), inputs = args, call.op.roles.inputs.split()
    for outputs, placed in sharding._shardings(call.op.raw[0], *raw):
        by_role = {role: placement for role, placement in zip(inputs, placed) if placement is not None}
        yield [by_role[letter] for letter in call.letters], outputs[0]


class Noted(TorchDispatchMode):
    """While active, appends the arguments of each call of an operator to a list."""

    def __init__(self, overload: Any, found: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.overload, self.found = overload, found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.overload:
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def every_op(world: int) -> None:
    """The example of each op that trains, on each sharding that its roles allow: without communication in the forward, its
    result and gradients are those of the unsharded call."""
    mesh = init_device_mesh("cpu", (world,))
    for call in CALLS:
        found = list(placements(call, mesh))
        assert len(found) >= 2 or "q" in call.op.roles.inputs, f"{call.name}: nothing but replicas"
        for placed, result in found:
            what = f"{call.name}: {placed}"
            local = call.tensors(torch.float64, requires_grad=True)
            many = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(local, placed)]
            with CommDebugMode() as communication:
                out = call.ours(*many)
            assert communication.get_total_counts() == 0, f"{what}: {communication.get_comm_counts()}"
            assert out.placements == (result,), f"{what}: {out.placements}, not {result}"
            expected = call.ours(*local)
            torch.testing.assert_close(out.full_tensor(), expected, msg=lambda m, what=what: f"{what}: {m}")
            out.full_tensor().square().sum().backward()
            expected.square().sum().backward()
            for i, (got, want) in enumerate(zip(many, local)):
                message = f"{what}: gradient {i}"
                torch.testing.assert_close(got.grad.full_tensor(), want.grad, msg=lambda m, what=message: f"{what}: {m}")  # type: ignore[union-attr]


def ops_without_gradients(world: int) -> None:
    """Replicated and, where the roles allow it, by rows: the bits of the unsharded call. (gloo moves no fp8 numbers.)"""
    mesh, rank = init_device_mesh("cpu", (world,)), dist.get_rank()
    ways = 0
    for op in (op for op in REGISTRY.values() if not op.trains):
        sample = op.example("cpu", torch.bfloat16)
        expected = op.public(*sample.args, **sample.kwargs)
        letters = dict(zip((i for i, a in enumerate(sample.args) if isinstance(a, Tensor)), roles_of(op, sample)))
        for rows in (Replicate(), *([] if "q" in op.roles.inputs else [Shard(0)])):
            placed = {i: rows if letter in "xyzs" else Replicate() for i, letter in letters.items()}
            args = [placed_whole(a, mesh, placed[i], rank) if i in placed else a for i, a in enumerate(sample.args)]
            out = op.public(*args, **sample.kwargs)
            for got, want in zip(*((t,) if isinstance(t, Tensor) else t for t in (out, expected))):
                assert got.placements == (rows,), f"{op.name}: {got.placements}, not {rows}"
                part = want.chunk(world)[rank] if rows.is_shard() else want
                assert torch.equal(got.to_local().view(torch.uint8), part.view(torch.uint8)), f"{op.name}, {rows}"
            ways += 1
    assert ways


def placed_whole(tensor: Tensor, mesh: Any, placement: Any, rank: int) -> DTensor:
    """A tensor that every process has, as a DTensor, with nothing sent."""
    local = tensor.chunk(mesh.size())[rank] if placement.is_shard() else tensor
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride())


def what_needs_communication(world: int) -> None:
    """A shard over what an op reduces is gathered, and the result is right; an ordinary weight with a DTensor is refused."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    placed = distribute_tensor(x, mesh, [Shard(2)])
    torch.testing.assert_close(fused_softmax(placed).full_tensor(), fused_softmax(x))
    torch.testing.assert_close(fused_layernorm(placed, (12,)).full_tensor(), fused_layernorm(x, (12,)))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        fused_layernorm(placed, (12,), torch.ones(12, dtype=torch.float64))


def compiled(world: int) -> None:
    """torch.compile of a call on DTensors, forward and backward, in one graph."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    local, placed = x.clone().requires_grad_(), distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    function = torch.compile(lambda x: fused_softmax(fused_layernorm(x, (12,))), fullgraph=True, backend="aot_eager")
    out = function(placed)
    expected = fused_softmax(fused_layernorm(local, (12,)))
    torch.testing.assert_close(out.full_tensor(), expected)
    out.full_tensor().square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(placed.grad.full_tensor(), local.grad)  # type: ignore[union-attr]


CHECKS = {
    2: (compiled, operator, every_op, ops_without_gradients, what_needs_communication, tensor_parallel, fsdp2),
    4: (tensor_parallel, fsdp2),
}  # fmt: skip


def run(rank: int, world: int, port: int, folder: str) -> None:
    """One process: each check's outcome into folder/<check>.<rank>, empty where it passed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for check in CHECKS[world]:
        try:
            check(world)
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()
