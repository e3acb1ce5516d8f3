"""The rows that are measured first, and who is measured in which sweep over them: the order of value, said once.

A run that is cut short has measured the rows at the top against the peers at the top. The matrix (tasks.py) holds these rows
and all others; the plans (plans.py) say which sweeps a call makes.
"""

from __future__ import annotations

from collections.abc import Iterable

from .tasks import Task, all_tasks

ROWS: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    ("softmax", ("4k", "bert_base_attention", "gpt2_vocabulary"), "bf16", ("fwd", "bwd")),
    ("layer_norm", ("8192x4096", "16384x768", "4096x16384"), "bf16", ("fwd", "bwd")),
    ("linear", ("bert_base_fc1_gelu", "bert_base_fc1_gelu_tanh"), "bf16", ("fwd", "train_fwd", "bwd")),
    ("softmax", ("latency_140x4096",), "bf16", ("fwd:wall",)),
    ("layer_norm", ("140x4096",), "bf16", ("fwd:wall", "fwd+bwd:wall")),
    ("linear", ("latency_140_gelu",), "bf16", ("fwd:wall",)),
    ("linear", ("llama3_8b_silu", "llama3_8b_gelu_tanh"), "bf16", ("fwd", "bwd")),
    ("gated_linear", ("llama3_8b_silu",), "bf16", ("fwd", "bwd")),
    ("mlp", ("gpt2_gelu_tanh",), "bf16", ("fwd", "fwd+bwd")),
    ("linear_fp8", ("wide_8192_None",), "float8_e4m3fn", ("fwd",)),
    ("softmax", ("8k", "32k", "vit_large_attention"), "bf16", ("fwd", "bwd")),
    ("layer_norm", ("8192x1024", "8192x8192", "2048x32768"), "bf16", ("fwd", "bwd")),
    ("softmax", ("64k", "llama3_vocabulary"), "bf16", ("fwd", "bwd")),
    ("layer_norm", ("2048x65536",), "bf16", ("fwd", "bwd")),
    ("linear", ("decode_1_silu", "decode_16_gelu"), "bf16", ("fwd",)),
    ("linear", ("bert_base_fc1_silu", "llama3_8b_gelu"), "bf16", ("fwd",)),
    ("softmax", ("latency_256x1024", "latency_1x4096"), "bf16", ("fwd:wall",)),
    ("layer_norm", ("256x1024", "1x4096"), "bf16", ("fwd:wall",)),
    ("linear", ("latency_256_gelu",), "bf16", ("fwd:wall",)),
)  # fmt: skip
"""(op, cases, dtype, passes), the most valuable first. A pass is kernel time; "fwd:wall" is the wall time of a call."""

SWEEPS: dict[int, tuple[str, ...]] = {
    1: ("eager", "ours", "cublaslt", "scaled_mm"),
    2: ("compile",),
    3: ("liger", "flag-gems", "helion", "quack", "torchscript"),
    4: ("tensorrt", "onnxruntime", "checkpoint", "ours+recompute"),
    5: ("compile-max-autotune",),
}
"""Sweep -> the providers that are measured on every row before those of the next sweep."""


def headline_tasks() -> list[Task]:
    """The tasks of ROWS, in order.

    Raises:
        KeyError: a row names no case of its op.
    """
    known = {tuple(t.key.values()): t for t in all_tasks()}
    found = []
    for op, cases, dtype, passes in ROWS:
        for case in cases:
            for said in passes:
                pass_, _, kind = said.partition(":")
                found.append(known[op, case, dtype, pass_, kind or "kernel"])
    return found


def sweep(numbers: Iterable[int], providers: Iterable[str]) -> list[tuple[Task, str]]:
    """(task, provider) of the sweeps, one sweep after the other, for those of providers that are here."""
    here = set(providers)
    return [(task, name) for n in numbers for task in headline_tasks() for name in SWEEPS[n] if name in here]
