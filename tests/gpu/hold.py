"""An op held to its contract on the GPU, forward and backward, with the inputs of a sample or of a benchmark case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_ops.testing import Case, ContractMode, Op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_IDS = ("bf16", "fp16", "fp32")
HELD_BYTES = 120  # at the most, for each element of an op's input or output, while its fp64 reference is compared


def memory_held(spec: Op, case: Case) -> int:
    """The most bytes of device memory that `hold` takes for a benchmark case, estimated. A row op counts x or y, not both."""
    elements = spec.bench.bytes(case)[0] // case.dtype.itemsize
    return elements * HELD_BYTES // (1 if spec.roles.multiplies else 2) + (1 << 29)


def on_gpu(value: Any) -> Any:
    """A tensor moved to the GPU with its strides and storage offset kept; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 0:
        return value.to("cuda")
    extent = value.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
    storage = value.as_strided((extent,), (1,), 0).to("cuda")
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


def hold(spec: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the public function in ContractMode; then backward, with a dy whose strides are not the output's."""
    as_leaf = _leaf if spec.trains else lambda value: value
    args = tuple(as_leaf(on_gpu(a)) for a in args)
    kwargs = {k: as_leaf(on_gpu(v)) for k, v in kwargs.items()}
    wanted = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
    with ContractMode() as mode:
        out = spec.public(*args, **kwargs)
        assert str(spec.fwd) in mode.checked, f"{spec.fwd} did not run"
        outputs = [o for o in ((out,) if isinstance(out, Tensor) else out) if o.requires_grad]
        if outputs:
            grads = torch.autograd.grad(outputs, wanted, [_unlike(o) for o in outputs], allow_unused=True)
            assert str(spec.bwd) in mode.checked, f"{spec.bwd} did not run"
            for leaf, grad in zip(wanted, grads):
                assert grad is not None
                assert grad.dtype is leaf.dtype
                assert grad.shape == leaf.shape
    torch.cuda.synchronize()


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _unlike(out: Tensor) -> Tensor:
    """Random numbers of out's shape in the memory order of its transpose."""
    dy = torch.randn(out.shape[::-1], device=out.device, dtype=torch.float32).to(out.dtype)
    return dy.permute(tuple(range(out.dim()))[::-1])
