"""What the audit compiles: every kernel that the calls of the ops' `audit` functions launch, on each audited GPU.

The calls run forward and backward on fake tensors (`launches.listed`), so a case is what a launch asks Triton for: the dtype and
alignment of each pointer, which sizes and strides are 1 or multiples of 16, the constants and the options. Nothing of it is
written down a second time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._runtime import clusters, gluon, settings
from .._runtime.rows import at_vectors
from .._torch.spec import REGISTRY, Op, Sample
from ..kernels.config import CLUSTER_CAPABILITIES, CLUSTER_TRITON
from ..ops.case_builders import INFERENCE
from ..ops.linear import matmul_plan
from .launches import ALIGNMENT, DEVICE, Gpu, Launch, Pointer, listed, replaced

ARCHITECTURES = (80, 90, 100, 120)
# The SM counts that configurations are chosen for: of the GPUs that are sold, and 132 everywhere.
_GPUS = {
    80: (("A100", 108), ("132 SMs", 132)),
    86: (("RTX 3090 Ti", 84), ("132 SMs", 132)),
    89: (("L40S", 142), ("132 SMs", 132)),
    90: (("H100 SXM, H200", 132), ("H100 PCIe", 114)),
    100: (("B200", 148), ("132 SMs", 132)),
    103: (("B300", 148), ("132 SMs", 132)),
    120: (("RTX 5090", 170), ("RTX PRO 6000", 188), ("132 SMs", 132)),
}
KNOWN_ARCHITECTURES = tuple(_GPUS)  # kernels/aot.py knows the limits of these
_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
}
_NARROW = ("fp8e4nv", "bf16", "fp16")
_BEFORE_CLUSTERS = (CLUSTER_TRITON[0], CLUSTER_TRITON[1] - 1)
_UNSAID = ("ASM", "BF16", "CVT", "SAME")  # flags that follow from the GPU or the dtype; EDGES without SAME is said
_DEFAULTS = {"num_warps": 4, "num_stages": 3, "num_ctas": 1, "maxnreg": None}  # Triton's, where a launch says nothing


def gpus_of(arch: int) -> tuple[Gpu, ...]:
    """The audited GPUs of a compute capability, as 90."""
    return tuple(Gpu(name, (arch // 10, arch % 10), sms) for name, sms in _GPUS[arch])


def audit_cases(
    architectures: Iterable[int] = ARCHITECTURES, select: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """The cases of every op for every architecture, each compilation once, as JSON for kernels/aot.py.

    Raises RuntimeError where this process was told to launch no compiled kernels.
    """
    if settings.INTERPRET or settings.BACKEND == "aten":
        raise RuntimeError("it lists what compiled kernels are launched: unset TRITON_INTERPRET and FUSED_OPS_BACKEND")
    return [dict(case) for arch in architectures for case in _cases_of(arch) if select(case)]


@functools.cache
def _cases_of(arch: int) -> tuple[dict[str, Any], ...]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    gpus = gpus_of(arch)
    passes = [(gpus[0], False), *[(gpus[0], True)] * (arch // 10 in CLUSTER_CAPABILITIES), *((gpu, False) for gpu in gpus[1:])]
    for gpu, compiled in passes:  # traced launches choose among the same tiles on every GPU: once an architecture
        for tag, launch in launches_on(gpu, compiled):
            if (key := launch.specialisation()) not in found:
                found[key] = case_of(launch, arch, tag)
    cases = list(found.values())
    _tell_apart(cases)
    return tuple(cases)


def launches_on(gpu: Gpu, compiled: bool) -> Iterator[tuple[str, Launch]]:
    """(name of the sample, launch) of every audited call on gpu.

    compiled: as a compiler traces the launches, through the dispatcher and without TMA, and with a Triton that has clusters. Else
    as eager calls make them, with the last Triton before clusters.
    """
    version = CLUSTER_TRITON if compiled else _BEFORE_CLUSTERS
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (clusters, "_triton", lambda: version), (clusters, "_given_up", set()), (settings, "CLUSTER", True),
            (settings, "GLUON", True), (gluon, "_given_up", set()),
            (matmul_plan, "at_vectors", _without_addresses if compiled else at_vectors),
        ):  # fmt: skip
            stack.enter_context(replaced(owner, name, value))
        for op in REGISTRY.values():
            with listed(gpu, dispatched=compiled) as launches:
                for sample in op.audit(DEVICE):
                    del launches[:]
                    _run(op, sample)
                    yield from ((sample.name, launch) for launch in tuple(launches))


def _without_addresses(*tensors: Tensor) -> bool | None:
    """at_vectors of tensors that a compiler traces with."""
    return at_vectors(*tensors) and None


def _run(op: Op, sample: Sample) -> None:
    """The call and its backward, to the tensors that require a gradient, or else to all; the call alone for inference."""
    if not op.trains or sample.name == INFERENCE:
        with torch.no_grad():
            op.public(*sample.args, **sample.kwargs)
        return
    given = [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, Tensor)]
    chosen = [tensor for tensor in given if tensor.requires_grad] or [tensor.requires_grad_() for tensor in given]
    y = op.public(*sample.args, **sample.kwargs)
    torch.autograd.grad(y, chosen, torch.empty_like(y))


def case_of(launch: Launch, arch: int, tag: str = "") -> dict[str, Any]:
    """A launch as one ahead-of-time compilation for kernels/aot.py. tag: what is special about the call, for its label."""
    function = launch.function()
    constant = {parameter.name for parameter in function.params if parameter.is_constexpr}
    values = dict(zip(function.arg_names, launch.args)) | dict(launch.options)
    options = {name: values.pop(name, default) for name, default in _DEFAULTS.items()}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for name in function.arg_names:
        value = values[name]
        if name in constant or (type(value) is int and value == 1):
            constexprs[name] = value
        else:
            signature[name] = _compiled_type(value)
    narrow = [text for value in signature.values() if (text := value[1:].partition(":")[0]) in _NARROW]
    return {
        "module": launch.module.partition(".kernels.")[2], "kernel": launch.kernel,
        "config": _label(values, constexprs, options, tag), "arch": arch, "dtype": narrow[0] if narrow else "fp32",
        "signature": signature, "constexprs": constexprs, **options,
        "aligned": _loads_are_wide(launch.kernel, signature, constexprs, options["num_warps"]),
        "min_triton": list(CLUSTER_TRITON) if options["num_ctas"] > 1 else None,
    }  # fmt: skip


def _compiled_type(value: Any) -> str:
    """How Triton's compiler takes an argument that is no constant."""
    if isinstance(value, Pointer):
        return f"*{_NAMES[value.dtype]}" + ":16" * value.aligned
    if type(value) is float:
        return "fp32"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + ":16" * (value % ALIGNMENT == 0)


def _loads_are_wide(kernel: str, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int) -> bool:
    """Whether a kernel's loads must be of 128 bits.

    Not where a tile has less than a vector for each thread, and not judged where narrow loads move the most by design: w and b of
    rows with edges, two for each element of x; a scale that is one for all, read for each element; copies by TMA; products' 16-row
    tiles of few rows.
    """
    if any(text.startswith("*") and not text.endswith(":16") for text in signature.values()):
        return False
    if "VEC" in constexprs:
        affine = constexprs.get("HAS_WEIGHT") or constexprs.get("HAS_BIAS")
        tile = constexprs.get("BLOCK_M", 1) * constexprs["BLOCK_N"]
        vectors = constexprs["VEC"] > 1 and tile >= constexprs["VEC"] * 32 * num_warps
        return vectors and not (constexprs.get("EDGES") and affine)
    steps = [text for name, text in signature.items() if name.startswith("stride") or name == "N"]
    one_scale = constexprs.get("HAS_SCALE") and "stride_xs" in signature
    few = "BLOCK_K" in constexprs and constexprs.get("BLOCK_M", 128) <= 16
    return all(text.endswith(":16") for text in steps) and not (one_scale or few or "_tma" in kernel)


def _label(values: dict[str, Any], constexprs: dict[str, Any], options: dict[str, int], tag: str) -> str:
    """A configuration's readable name: its tile or row length, and what is switched on."""
    if "BLOCK_K" in constexprs and "BLOCK_M" in constexprs:
        words = ["x".join(str(constexprs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))]
    else:
        words = [f"{name}={values[name]}" for name in ("N", "K") if name in values]
        if constexprs.get("BLOCK_M", 1) > 1 and "VEC" in constexprs:
            words.append(f"rows={constexprs['BLOCK_M']}")
    words += filter(None, (tag, constexprs.get("ACT")))
    for name, value in constexprs.items():
        if value is True and name not in _UNSAID:
            words.append(name.lower().removeprefix("has_").replace("_", " "))
    if constexprs.get("EDGES") and not constexprs.get("SAME", True):
        words.append("shifted")
    if options["num_ctas"] > 1:
        words.append(f"clusters of {options['num_ctas']}")
    return " ".join(words)


def _tell_apart(cases: list[dict[str, Any]]) -> None:
    """Add to the labels of cases with equal ones what differs between them."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["kernel"], case["dtype"], case["config"]), []).append(case)
    for group in groups.values():
        details = [
            {**case["signature"], **case["constexprs"], **{name: case.get(name) for name in _DEFAULTS}} for case in group
        ]  # fmt: skip
        names = dict.fromkeys(name for detail in details for name in detail)
        differ = [name for name in names if len({str(detail.get(name)) for detail in details}) > 1]
        for case, detail in zip(group, details):
            case["config"] = " ".join([case["config"], *(f"{name}={detail[name]}" for name in differ)])
