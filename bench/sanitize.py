"""The calls that compute-sanitizer watches: every op and family of kernels, on the sample inputs that stress addressing.

compute-sanitizer --tool memcheck --error-exitcode 86 python3 -m bench.sanitize
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_ops._torch.spec import FORWARD_ONLY, REGISTRY, OpSpec, Sample

# Beginnings of sample names, what stresses addressing most first: TMA descriptors whose tiles overhang, K in parts, rows in
# chunks or packed, other dimensions than the last, views.
PICK = (
    "descriptors_recompute", "descriptors", "small_m_long_k", "long_k", "long_row", "long_masked", "inner", "wide", "sliced",
    "offset", "transposed", "rows(37", "rows(9", "rows(33", "gelu", "silu",
)  # fmt: skip
MOST = 7  # samples an op and dtype


def subset(spec: OpSpec, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """At most MOST samples: the first of each name in PICK, and a row of a length that no sample has."""
    samples = {s.name: s for s in spec.samples(device, dtype)}
    found = (next((name for name in samples if name.startswith(pick)), None) for pick in PICK)
    names = [name for name in dict.fromkeys(found) if name is not None]
    yield from (samples[name] for name in names[:MOST])
    if spec.name in ("softmax", "layer_norm") and dtype is torch.float32:  # a cluster's, where they run
        row = torch.randn(1, 65536, device=device)
        yield Sample("cluster", (row, -1) if spec.name == "softmax" else (row, row.shape[1:]))
    if spec.name == "softmax":
        yield Sample("packed", (torch.randn(2, 32768, device=device).to(dtype), -1))  # forward and backward keep pairs


def run(device: str, dtypes: tuple[torch.dtype, ...]) -> int:
    """Run the subset on device. Returns the number of calls made."""
    calls = 0
    for name, spec in (REGISTRY | FORWARD_ONLY).items():
        for dtype in dtypes:
            for sample in subset(spec, device, dtype):
                args = [_leaf(a) for a in sample.args] if name in REGISTRY else sample.args
                out = spec.public(*args, **sample.kwargs)
                first = out if isinstance(out, Tensor) else out[0]
                if first.requires_grad:
                    first.backward(torch.randn_like(first))
                calls += 1
                if device == "cuda":
                    torch.cuda.synchronize()
        print(f"{name}: done", flush=True)
    return calls


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench.sanitize: needs a CUDA device")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch's pool would hide accesses beyond a tensor's end
    print(f"{run('cuda', (torch.bfloat16, torch.float32))} calls")
