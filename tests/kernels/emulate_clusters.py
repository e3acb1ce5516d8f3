"""The cluster kernels as compiled for sm_90, carried out by ptx_emulator on rows of every kind. Run as a program:

python -m tests.kernels.emulate_clusters [CASES]      print a JSON object a case, CASES of them or all

It needs a Triton that compiles clusters, 3.8 or later, and prints nothing with another.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_ops import REGISTRY, _audit
from fused_ops.kernels import aot
from fused_ops.testing import assert_within_contract

from .ptx_emulator import GLOBAL, Emulator

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INF = float("inf")
GUARD = 256  # bytes around each tensor that nothing may touch
ROWS = 4


def cases() -> list[dict[str, Any]]:
    """The audit's cases of clusters."""
    return [case for case in _audit.audit_cases((90,)) if case["num_ctas"] > 1]


def tensors(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Any, ...]]:
    """(inputs, outputs) of the kernel by the names of its pointers, and what the contract allows for the outputs."""
    N, dtype = int(case["config"].split()[0][2:]), DTYPES[case["dtype"]]
    torch.manual_seed(0)
    x = torch.randn(ROWS, N).mul_(3).to(dtype)
    spec = REGISTRY[case["kernel"].partition("_fwd")[0].partition("_bwd")[0]]
    if spec.name == "layer_norm":
        w, b = torch.randn(2, N).to(dtype)
        outputs = {"y_ptr": torch.empty_like(x), "mean_ptr": torch.empty(ROWS), "rstd_ptr": torch.empty(ROWS)}
        return {"x_ptr": x + 5, "w_ptr": w, "b_ptr": b}, outputs, spec.bound(x + 5, w, b, 1e-5)
    if "_bwd" in case["kernel"]:
        y = torch.softmax(x.float(), 1).to(dtype)
        dy = torch.randn(ROWS, N).to(dtype)
        return {"dy_ptr": dy, "y_ptr": y}, {"dx_ptr": torch.empty_like(x)}, spec.backward.bound(dy, y, 1, dtype)
    x[1, :-3] = -INF  # all but the last program's part
    x[2] = -INF
    x[3, -1] = float("nan")
    return {"x_ptr": x}, {"y_ptr": torch.empty_like(x)}, spec.bound(x, 1, None)


def emulate(case: dict[str, Any], ptx: str) -> dict[str, Any]:
    """Carry out ptx for the case; AssertionError where a result is outside the contract. Returns what it saw."""
    inputs, outputs, expected = tensors(case)
    places: dict[str, tuple[int, int]] = {}
    chunks, end = [], 0
    for name, tensor in (inputs | outputs).items():
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1) if name in inputs else None
        size = tensor.numel() * tensor.element_size()
        places[name] = end + GUARD, size
        chunks += [np.full(GUARD, 0xAB, np.uint8), np.full(size, 0xCD, np.uint8) if raw is None else raw]
        chunks.append(np.full(GUARD + -size % 16, 0xAB, np.uint8))
        end = sum(map(len, chunks))
    memory = np.concatenate(chunks)
    N = int(case["config"].split()[0][2:])
    names = [name for name in aot._kernel(case).arg_names if name not in case["constexprs"]]
    values = {name: GLOBAL + places[name][0] for name in places} | {"N": N, "eps": 1e-5}
    params = [values.get(name, N) for name in names]  # the others are strides
    emulator = Emulator(ROWS, case["num_ctas"], 32 * case["num_warps"], [*params, 0, 0], memory)
    emulator.run(ptx)
    elsewhere = emulator.stores.copy()
    for name, out, bound in zip(outputs, outputs.values(), expected):
        start, size = places[name]
        elsewhere[start : start + size] -= 1
        got = torch.frombuffer(bytearray(memory[start : start + size].tobytes()), dtype=out.dtype).view(out.shape)
        assert_within_contract(got, bound, f"{case['kernel']} {case['config']} {name}")
    reads = [emulator.loads[start : start + size] for start, size in (places[name] for name in inputs if name[0] not in "wb")]
    again = sum(int((count > 1).sum()) for count in reads) // (len(reads) * next(iter(inputs.values())).element_size())
    return {
        "kernel": case["kernel"], "config": case["config"], "dtype": case["dtype"], "races": emulator.races,
        "cluster_reads": emulator.cluster_reads, "unread": sum(int((count == 0).sum()) for count in reads),
        "read_again": again, "not_stored_once": int((elsewhere != 0).sum()),
    }  # fmt: skip


def main(limit: int | None) -> None:
    """Emulate, and then once more without each of the cluster's barriers."""
    import triton

    from fused_ops._cluster import can_cluster

    if not can_cluster(-1):
        return
    for case in itertools.islice(cases(), limit):
        ptx = aot.compiled_case(case).asm["ptx"]
        print(json.dumps({"triton": triton.__version__, **emulate(case, ptx)}), flush=True)
    parts = ptx.split("barrier.cluster.wait")
    for i in range(1, len(parts)):
        without = "barrier.cluster.wait".join(parts[:i]) + "bar.sync" + "barrier.cluster.wait".join(parts[i:])
        print(json.dumps({"without": i, **emulate(case, without)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else None)
