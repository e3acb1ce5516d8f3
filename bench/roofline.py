"""The hardware's limits, measured in the same run: the copy bandwidth and the matrix rates that everything is held to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .tasks import Task, dtype_name
from .timing import Replay

COPY_BYTES = 2 << 30  # read, and as many written
MATRIX_N = 8192


@dataclass
class Roofline:
    """bandwidth in bytes/s (read + written by a large device copy); rates: dtype name -> FLOP/s of a large cuBLAS product."""

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def limit(self, moved: int, flops: int, task: Task) -> float:
        """Seconds that no implementation beats by much: the larger of the fewest bytes' and the FLOPs' time.

        The FLOPs of ops that are no matrix products do not run on tensor cores and hide behind memory: left out.
        """
        rate = self.rates.get(dtype_name(task.case.dtype)) if task.is_matmul else None
        return max(moved / self.bandwidth, flops / rate if rate else 0.0)


def copy_samples(nbytes: int = COPY_BYTES, samples: int = 20) -> list[float]:
    """Seconds of one device-to-device copy of nbytes random bytes."""
    source = torch.randint(0, 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    replay = Replay([lambda: (target.copy_(source),)])
    return [replay.sample() for _ in range(samples)]


def matmul_samples(dtype: torch.dtype, n: int = MATRIX_N, samples: int = 20) -> list[float]:
    """Seconds of one (n, n) x (n, n) product of random matrices; float8 through torch._scaled_mm, K-major."""
    a, b = torch.randn(2, n, n, device="cuda").mul_(n**-0.5).to(dtype)
    if dtype is torch.float8_e4m3fn:
        one = torch.ones((), device="cuda")
        replay = Replay([lambda: (torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),)])
    else:
        replay = Replay([lambda: (a @ b,)])
    return [replay.sample() for _ in range(samples)]


def matmul_dtypes() -> list[torch.dtype]:
    """The dtypes whose rate can be measured on this GPU."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    return dtypes + [torch.float8_e4m3fn] if torch.cuda.get_device_capability() >= (8, 9) else dtypes
