"""forecast(): the time of one pass of an op, from the launches that it makes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import products, rows
from .gpus import Gpu, host_seconds
from .limits import Launch, longest

MODEL_VERSION = 2
"""Raised whenever a forecast may change without a change of the kernels: forecasts of two versions do not compare."""

ACTIVATIONS = ("gelu_tanh", "quick_gelu", "gelu", "silu", "relu2", "relu", "sigmoid", "tanh")  # longest endings first
PASSES = ("fwd", "train_fwd", "bwd", "fwd+bwd")


@dataclass(frozen=True)
class Forecast:
    """What is forecast: seconds of one call; binding, the limit that takes longest; and the launches it is made of.

    binding is a limit's name (see Launch), "launch", or "host".
    """

    seconds: float
    binding: str
    launches: tuple[Launch, ...]


def variant_of(case: str) -> str:
    """The activation that a case's name ends in, or "none"."""
    return next((name for name in ACTIVATIONS if case.endswith("_" + name)), "none")


def forecast(
    op: str, shape: tuple[int, ...], itemsize: int, pass_: str, gpu: Gpu, *,
    kind: str = "kernel", activation: str = "none", work: tuple[int, int] = (0, 0),
) -> Forecast:  # fmt: skip
    """The time that a pass of an op should take, with the kernels as they are.

    Args:
        op: its name in REGISTRY.
        shape: (M, N), or (M, N, K) of a product, as in its benchmark cases.
        itemsize: bytes an element of the input.
        pass_: "fwd", "train_fwd", "bwd" or "fwd+bwd".
        gpu: coefficients, such as GPUS["h100"].
        kind: "kernel", device time; or "wall", where host time is a limit too.
        activation: of products.
        work: (bytes, FLOPs) at the least, for ops that no model is of.

    Raises:
        ValueError: pass_ or kind is none of the above, or the op has no such pass.
    """
    if pass_ not in PASSES or kind not in ("kernel", "wall"):
        raise ValueError(f"forecast: got pass {pass_!r} and kind {kind!r}, allowed: {', '.join(PASSES)}; kernel, wall")
    launches = tuple(_launches(op, shape, itemsize, pass_, activation, work, gpu))
    if not launches:
        raise ValueError(f"forecast: {op} has no {pass_}: it is forward only")
    seconds, binding = sum(launch.seconds for launch in launches), longest(launches).binding
    if kind == "wall":
        host = host_seconds(op, pass_, gpu)
        if host > seconds:
            return Forecast(host, "host", launches)
    return Forecast(seconds, binding, launches)


def _launches(
    op: str, shape: tuple[int, ...], itemsize: int, pass_: str, activation: str, work: tuple[int, int], gpu: Gpu
) -> list[Launch]:
    model = _MODELS.get(op)
    if model is None:
        rate = gpu.rates[itemsize] if op in ("attention",) else float("inf")
        limits = {"memory": work[0] / gpu.copy / 0.9, "tensor": work[1] / rate}
        return [Launch(op, limits, floor=gpu.launch, norm=gpu.norm)]
    fwd, bwd = model
    if op == "linear_fp8" and pass_ != "fwd":
        return []
    training = pass_ != "fwd"
    launches = [] if pass_ == "bwd" else fwd(shape, itemsize, activation, training, gpu)
    return launches + (bwd(shape, itemsize, activation, gpu) if pass_ in ("bwd", "fwd+bwd") else [])


_Fwd = Callable[[tuple[int, ...], int, str, bool, Gpu], list[Launch]]
_Bwd = Callable[[tuple[int, ...], int, str, Gpu], list[Launch]]


def _saves(activation: str, training: bool) -> bool:
    return training and activation != "none"


_MODELS: dict[str, tuple[_Fwd, _Bwd]] = {
    "softmax": (
        lambda s, i, a, t, g: rows.softmax(s[0], s[-1], i, False, g),
        lambda s, i, a, g: rows.softmax(s[0], s[-1], i, True, g),
    ),
    "layer_norm": (
        lambda s, i, a, t, g: rows.layer_norm_fwd(s[0], s[-1], i, g),
        lambda s, i, a, g: rows.layer_norm_bwd(s[0], s[-1], i, g),
    ),
    "rms_norm": (
        lambda s, i, a, t, g: rows.rms_norm_fwd(s[0], s[-1], i, g),
        lambda s, i, a, g: rows.rms_norm_bwd(s[0], s[-1], i, g),
    ),
    "linear": (
        lambda s, i, a, t, g: products.linear_fwd(s[0], s[1], s[2], i, a, _saves(a, t), g),
        lambda s, i, a, g: products.linear_bwd(s[0], s[1], s[2], i, a, g),
    ),
    "gated_linear": (
        lambda s, i, a, t, g: products.gated_fwd(s[0], s[1], s[2], i, a, t, g),
        lambda s, i, a, g: products.gated_bwd(s[0], s[1], s[2], i, a, g),
    ),
    "mlp": (
        lambda s, i, a, t, g: products.mlp_fwd(s[0], s[1], s[2], i, a, t, g),
        lambda s, i, a, g: products.mlp_bwd(s[0], s[1], s[2], i, a, g),
    ),
    "linear_fp8": (
        lambda s, i, a, t, g: products.linear_fwd(s[0], s[1], s[2], 1, a, False, g),
        lambda s, i, a, g: [],  # it has no backward
    ),
}  # fmt: skip

SIZES = {"softmax": 2, "layer_norm": 2, "rms_norm": 2, "linear": 3, "gated_linear": 3, "mlp": 3, "linear_fp8": 3}
"""The ops that there is a model of -> how many sizes each has."""


@functools.cache
def kernels_hash() -> str:
    """The hash of the kernels' source that the forecasts are for: 12 hexadecimal digits."""
    folder = Path(__file__).parents[2] / "kernels"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.parent.name != "sass"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
