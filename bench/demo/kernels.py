"""The demo's steps that must run the Triton kernels themselves: embeddings, and one training step.

A process of its own, `python -m bench.demo.kernels DEVICE OUT`: without a GPU it runs under TRITON_INTERPRET=1, which
must be set before the first import. Prints the name of each stage as it begins; writes its rows to OUT as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import fuse, unfuse

from . import minilm
from .rows import Row

EMBED, TRAIN, SPEED = "embed through the kernels", "one training step", "speed"
STAGES = ("unfused model", "fused forward", "fused training step", "forward after the step")
# A gradient is compared with its own norm, but not with less than this part of the whole gradient's: the exact gradient
# of an attention key's bias is zero, and what is computed for it is rounding.
NORM_FLOOR = 1e-3
LEARNING_RATE = 0.01
Counts = dict[str, tuple[int, int]]  # FuseReport.coverage's


class CountOperators(TorchDispatchMode):
    """Counts the calls that reach fused_ops' registered operators, forward and backward apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_ops":
            self.calls["bwd" if "_bwd" in func.name() else "fwd"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts operators, and under "interpreted" the kernels that Triton's interpreter runs."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode.calls["interpreted"] += 1
        return run(self, *args, **kwargs)

    with CountOperators() as mode, mock.patch.object(GridExecutor, "__call__", counted):
        yield mode.calls


def operator_rows(step: str, check: str, calls: Counter[str], direction: str, expected: int, note: str) -> list[Row]:
    """Rows that check the number of operator calls and, without a GPU, that each ran a kernel in the interpreter, not ATen."""
    rows = [Row(step, check, calls[direction], "==", expected, note)]
    if not torch.cuda.is_available():
        rows.append(Row(step, "kernels interpreted", calls["interpreted"], ">=", calls["fwd"] + calls["bwd"], "not ATen"))
    return rows


def gradients(model: nn.Module, batch: minilm.Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = minilm.loss_of(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """(largest |ours - theirs| / |theirs| over the parameters' gradients, as norms; the name of that parameter)."""
    if ours.keys() != theirs.keys():
        return float("inf"), f"gradients for different parameters: {sorted(ours.keys() ^ theirs.keys())}"
    total = float(torch.stack([g.norm() for g in theirs.values()]).norm())
    errors = {name: float((ours[name] - g).norm()) / max(float(g.norm()), NORM_FLOOR * total) for name, g in theirs.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst


def _all(fused: Counts) -> int:
    return sum(done for done, _ in fused.values())


def embed_rows(model: nn.Module, batch: minilm.Batch, eager: Tensor, fused: Counts) -> list[Row]:
    with torch.no_grad(), counting() as calls:
        embeddings = minilm.pooled(model(**batch).last_hidden_state, batch["attention_mask"])
    rows = [
        *operator_rows(EMBED, "fused operators run", calls, "fwd", _all(fused), "as many as the report says"),
        Row(EMBED, "max |fused - unfused|", float((embeddings - eager).abs().max()), "<=", 1e-5, "unit vectors, fp32"),
    ]
    for (first, _), cosine, published in zip(minilm.PAIRS, minilm.cosines(embeddings), minilm.PUBLISHED):
        note = f"{cosine:.6f}, published {published}: {first}"
        rows.append(Row(EMBED, "|cosine - published|", abs(cosine - published), "<=", 1e-4, note))
    return rows


def train_rows(model: nn.Module, batch: minilm.Batch, eager: tuple[float, dict[str, Tensor]], fused: Counts) -> list[Row]:
    with counting() as calls:
        loss, grads = gradients(model, batch)
    error, worst = worst_gradient(grads, eager[1])
    operators = _all(fused) + fused["linear"][0]
    print(STAGES[3], flush=True)
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        after = float(minilm.loss_of(model, batch))
    return [
        Row(TRAIN, "|loss - unfused loss|", abs(loss - eager[0]), "<=", 1e-6, f"loss {loss:.6f}"),
        *operator_rows(TRAIN, "fused backward operators run", calls, "bwd", operators, "one each, two with an activation"),
        Row(TRAIN, "parameters with a gradient", len(grads), "==", len(list(model.parameters()))),
        Row(TRAIN, "gradients' largest relative error", error, "<=", 1e-4, f"worst: {worst}"),
        Row(TRAIN, "loss after the step / before", after / loss, "<=", 1 - 1e-3, f"SGD, {loss:.4f} to {after:.4f}"),
    ]


def milliseconds(function: Any) -> float:
    """Median of repeated runs on the GPU, synchronised."""
    from torch.utils import benchmark

    return 1e3 * benchmark.Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=1.0).median


def speed_notes(model: nn.Module, batch: minilm.Batch) -> dict[str, float]:
    """Milliseconds of a forward pass and a training step, fused and unfused. Reported, not held to a bound."""
    large = {name: tensor.repeat(64, 8)[:, :128].contiguous() for name, tensor in batch.items()}
    times: dict[str, float] = {}
    for name in ("fused", "unfused"):
        if name == "unfused":
            unfuse(model)
        with torch.no_grad():
            times[f"{name} forward ms"] = milliseconds(lambda: model(**large))
        times[f"{name} forward and backward ms"] = milliseconds(lambda: minilm.loss_of(model, large).backward())
    return times


def main(device: str, out: str) -> None:
    print(STAGES[0], flush=True)
    model, batch = minilm.load(device), minilm.pair_batch(device)
    with torch.no_grad():
        eager = minilm.pooled(model(**batch).last_hidden_state, batch["attention_mask"])
    eager_step = gradients(model, batch)
    fused = fuse(model, strict=True).coverage()
    print(STAGES[1], flush=True)
    rows = embed_rows(model, batch, eager, fused)
    print(STAGES[2], flush=True)
    rows += train_rows(model, batch, eager_step, fused)
    times = speed_notes(model, batch) if device == "cuda" else {}
    Path(out).write_text(json.dumps({"rows": [asdict(row) for row in rows], "times": times}))


if __name__ == "__main__":
    main(*sys.argv[1:])
