"""DTensor, tensor parallelism and FSDP2 on two and four processes, equal to one process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops.distributed import ROLES

CHECKS = {
    2: ("compiled", "operator", "what_needs_communication", "tensor_parallel", "fsdp2"),
    4: ("tensor_parallel", "fsdp2"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of outcomes of each group of processes, each group started once."""
    from torch.multiprocessing import spawn

    from tests.torch import distributed_worker

    folders = {}
    for world, names in CHECKS.items():
        assert tuple(check.__name__ for check in distributed_worker.CHECKS[world]) == names
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            spawn(distributed_worker.run, (world, port, str(folders[world])), nprocs=world)
        except torch.multiprocessing.ProcessExitedException as error:
            (folders[world] / "crash").write_text(str(error))
    return folders


@pytest.mark.parametrize(("world", "check"), [(world, check) for world, checks in CHECKS.items() for check in checks])
def test_processes_agree_with_one(outcomes: dict[int, Path], world: int, check: str) -> None:
    for rank in range(world):
        outcome = outcomes[world] / f"{check}.{rank}"
        assert outcome.exists(), "the process ended before this check"
        assert outcome.read_text() == "", f"process {rank}"


def test_every_role_names_an_argument() -> None:
    """A table entry has one role for each argument and output of its operator, and the argument it points at is a bool."""
    for spec in REGISTRY.values():
        for name, overload in ((f"{spec.name}_fwd", spec.fwd), (f"{spec.name}_bwd", spec.bwd)):
            assert name in ROLES, f"{name} would run on replicated tensors"
            inputs, outputs = (roles.split() for roles in ROLES[name])
            arguments = overload._schema.arguments
            assert [role == "-" for role in inputs] == ["Tensor" not in str(a.type) for a in arguments]
            assert len(outputs) == len(overload._schema.returns)
            assert all(str(arguments[int(o[1:])].type) == "bool" for o in outputs if o[1:])


def test_registered_only_when_used() -> None:
    """Neither the import nor a plain call, short or long way, imports DTensor."""
    code = (
        "import sys, torch, fused_ops\n"
        "x = torch.randn(2, 4, requires_grad=True)\n"
        "fused_ops.fused_softmax(x).sum().backward()\n"
        "torch.func.vmap(fused_ops.fused_softmax)(x)\n"
        "from fused_ops import distributed\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert distributed.register.cache_info().misses == 0\n"
        "import torch.distributed.tensor\n"
        "torch.func.vmap(fused_ops.fused_softmax)(x)\n"
        "assert distributed.register.cache_info().misses == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
