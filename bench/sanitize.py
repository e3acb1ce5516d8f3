"""What compute-sanitizer watches: every op, forward and backward, on the samples that stress addressing. It is slow there.

compute-sanitizer --tool memcheck --error-exitcode 86 python3 -m bench.sanitize
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_ops import REGISTRY
from fused_ops._spec import OpSpec, Sample

PICK = ("rows(37", "rows(9", "rows(33", "sliced", "offset", "transposed", "long_row", "inner", "wide", "gelu", "silu")
MOST = 6  # samples an op and dtype


def subset(spec: OpSpec, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """At most MOST samples whose names say that they stress addressing, or else the first ones."""
    samples = list(spec.samples(device, dtype))
    chosen = [s for s in samples if s.name.startswith(PICK)] or samples
    yield from chosen[:MOST]


def run(device: str, dtypes: tuple[torch.dtype, ...]) -> int:
    """Run the subset on device. Returns the number of calls made."""
    calls = 0
    for name, spec in REGISTRY.items():
        for dtype in dtypes:
            for sample in subset(spec, device, dtype):
                args = [
                    a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args
                ]
                out = spec.public(*args, **sample.kwargs)
                first = out if isinstance(out, Tensor) else out[0]
                if first.requires_grad:
                    first.backward(torch.randn_like(first))
                calls += 1
                if device == "cuda":
                    torch.cuda.synchronize()
        print(f"{name}: done", flush=True)
    return calls


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench.sanitize: needs a CUDA device")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch's pool would hide accesses beyond a tensor's end
    print(f"{run('cuda', (torch.bfloat16, torch.float32))} calls")
