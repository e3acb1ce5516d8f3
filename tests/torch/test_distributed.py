"""DTensor, tensor parallelism and FSDP2 on two and four processes, equal to one process."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from fused_ops import REGISTRY
from tests import process

CHECKS = {
    2: ("compiled", "operator", "every_op", "ops_without_gradients", "what_needs_communication", "tensor_parallel", "fsdp2"),
    4: ("tensor_parallel", "fsdp2"),
}


GROUP = """
from torch.multiprocessing import start_processes
from tests.torch import distributed_worker
import torch._dynamo
start_processes(distributed_worker.run, ({world}, {port}, {folder!r}), nprocs={world}, start_method="fork")
"""  # forked from one process that has imported all and computed nothing


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_agree_with_one(world: int, tmp_path: Path) -> None:
    """One group of processes runs all its checks; each must have passed on each process."""
    from tests.torch import distributed_worker

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert tuple(check.__name__ for check in distributed_worker.CHECKS[world]) == CHECKS[world]
    process.output(GROUP.format(world=world, port=port, folder=str(tmp_path)))
    outcomes = {
        f"{check}, process {rank}": (tmp_path / f"{check}.{rank}").read_text()
        for check in CHECKS[world]
        for rank in range(world)
    }
    failed = {name: outcome for name, outcome in outcomes.items() if outcome}
    assert not failed, "\n".join(f"{name}:\n{outcome}" for name, outcome in failed.items())


def test_every_role_names_an_argument() -> None:
    """An operator has one role for each argument and output, and the argument that an output's role points at is a bool."""
    for raw in (raw for op in REGISTRY.values() for raw in op.raw):
        arguments = raw.overload._schema.arguments
        optional = next((i for i, a in enumerate(arguments) if str(a.type) == "Optional[Tensor]"), None)
        for left_out in {None, optional}:
            roles = raw.roles_of([None if i == left_out else torch.ones(2, 2) for i in range(len(arguments))])
            inputs, outputs = roles.inputs.split(), roles.outputs.split()
            assert set(roles.inputs + roles.outputs) <= set("-xyzswbWBvq 0123456789")
            tensors = ["Tensor" in str(a.type) for a in arguments]
            tensors[2] &= roles.inputs != "y y - y - - - -"  # linear_bwd without its weight
            assert [role != "-" for role in inputs] == tensors
            assert len(outputs) == len(raw.overload._schema.returns)
            assert all(str(arguments[int(o[1:])].type) == "bool" for o in outputs if o[1:])
            assert roles.dim is None or str(arguments[roles.dim].type) == "int"


def test_registered_only_when_used() -> None:
    """Neither the import nor a call on ordinary tensors, by the fast path or the dispatcher, imports DTensor."""
    code = (
        "import sys, torch, fused_ops\n"
        "x = torch.randn(2, 4, requires_grad=True)\n"
        "fused_ops.fused_softmax(x).sum().backward()\n"
        "with torch.autograd.forward_ad.dual_level(): fused_ops.fused_softmax(x)\n"
        "from fused_ops._torch import sharding\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert sharding.register.cache_info().misses == 0\n"
        "import torch.distributed.tensor\n"
        "with torch.autograd.forward_ad.dual_level(): fused_ops.fused_softmax(x)\n"
        "assert sharding.register.cache_info().misses == 1\n"
    )
    process.output(code)
