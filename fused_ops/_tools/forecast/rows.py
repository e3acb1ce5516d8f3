"""Forecasts of kernels over rows by formula: softmax, layer norm and RMS norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import counts
from .gpus import Gpu
from .limits import Launch, last_wave

if TYPE_CHECKING:
    from ...kernels.config import RowConfig

WARPS_AN_SM = 64
REGISTERS_AN_SM = 65536
PARTIAL_BYTES = 4


def softmax(M: int, N: int, itemsize: int, backward: bool, gpu: Gpu) -> list[Launch]:
    """The launches of softmax over the last dimension of (M, N)."""
    from ...kernels.softmax.softmax import softmax_bwd_config, softmax_fwd_config

    choose = softmax_bwd_config if backward else softmax_fwd_config
    config = choose(M, N, itemsize, gpu.capability, gpu.sms)
    kernel = "softmax_bwd" if backward else "softmax_fwd"
    return [_rows(kernel, config, M, N, itemsize, 2 if backward else 1, 0, 0 if backward else 1, gpu)]


def layer_norm_fwd(M: int, N: int, itemsize: int, gpu: Gpu) -> list[Launch]:
    """The launch of layer norm's forward over the last dimension of (M, N)."""
    from ...kernels.norm.layer_norm import layer_norm_fwd_config

    config = layer_norm_fwd_config(M, N, itemsize, gpu.capability, gpu.sms, N * itemsize % 16 == 0)
    return [_rows("layer_norm_fwd", config, M, N, itemsize, 1, 2 * N * itemsize, 0, gpu)]


def rms_norm_fwd(M: int, N: int, itemsize: int, gpu: Gpu) -> list[Launch]:
    """The launch of RMS norm's forward over the last dimension of (M, N)."""
    from ...kernels.norm.rms_norm import rms_norm_fwd_config

    config = rms_norm_fwd_config(M, N, itemsize, gpu.capability, gpu.sms, N * itemsize % 16 == 0)
    return [_rows("rms_norm_fwd", config, M, N, itemsize, 1, N * itemsize, 0, gpu)]


def layer_norm_bwd(M: int, N: int, itemsize: int, gpu: Gpu) -> list[Launch]:
    """The launches of layer norm's backward over (M, N): a persistent grid, and the sum of its partial rows."""
    from ...kernels.norm.layer_norm_bwd import layer_norm_bwd_config, layer_norm_bwd_programs

    config = layer_norm_bwd_config(M, N, itemsize, gpu.capability, gpu.sms, N * itemsize % 16 == 0)
    return _norm_bwd("layer_norm_bwd", config, layer_norm_bwd_programs(M, config, gpu.sms), M, N, itemsize, 2, gpu)


def rms_norm_bwd(M: int, N: int, itemsize: int, gpu: Gpu) -> list[Launch]:
    """The launches of RMS norm's backward over (M, N): a persistent grid, and the sum of its partial rows."""
    from ...kernels.norm.rms_norm import rms_norm_bwd_config, rms_norm_bwd_programs

    config = rms_norm_bwd_config(M, N, itemsize, gpu.capability, gpu.sms, N * itemsize % 16 == 0)
    return _norm_bwd("rms_norm_bwd", config, rms_norm_bwd_programs(M, config, gpu.sms), M, N, itemsize, 1, gpu)


def _norm_bwd(
    kernel: str, config: RowConfig, programs: int, M: int, N: int, itemsize: int, parameters: int, gpu: Gpu
) -> list[Launch]:
    """parameters: how many have a gradient."""
    read, row = 2 * M * N * itemsize, 2 * N * itemsize
    resident = max(1, min(programs, gpu.sms * _resident(kernel, config)))
    trips = M / config.block_m
    ins = _instructions(kernel, config, N, itemsize) * trips
    reread = _missed(read, programs * config.block_m * row, gpu) if config.chunked else 0.0
    partial = parameters * programs * N * PARTIAL_BYTES
    flying = resident * (config.block_m * (2 * config.block_n * itemsize if config.chunked else row))
    limits = {
        "memory": (1.5 * read + reread + partial) / gpu.copy,
        "issue": gpu.issue(1, ins, config.num_warps) * max(1.0, gpu.sms / programs),
        "in flight": (read + reread) * gpu.latency / (flying * counts.DUTY_PERSISTENT),
    }
    main = Launch(kernel, limits, _uneven(trips, programs), gpu.launch, gpu.norm)
    return [main, column_sum(programs, parameters * N, gpu)]


def column_sum(partial_rows: int, columns: int, gpu: Gpu) -> Launch:
    """The second stage: partial rows of fp32, still in L2 where they fit, added in a fixed order."""
    nbytes = partial_rows * columns * PARTIAL_BYTES
    rate = gpu.sms * gpu.sm_bytes / 4 if nbytes < gpu.l2_share * gpu.l2_bytes else gpu.copy
    return Launch("column_sum", {"memory": nbytes / rate + gpu.latency}, floor=gpu.launch, norm=gpu.norm)


def elementwise(name: str, elements: int, tensors: float, itemsize: int, instructions: float, gpu: Gpu) -> Launch:
    """A kernel that reads and writes so many tensors of so many elements, at so many instructions an element of a lane."""
    limits = {"memory": tensors * elements * itemsize / gpu.copy, "issue": gpu.issue(elements / 32, instructions, 1)}
    return Launch(name, limits, floor=gpu.launch, norm=gpu.norm)


def _rows(
    kernel: str, config: RowConfig, M: int, N: int, itemsize: int, reads: int, shared: int, special: int, gpu: Gpu
) -> Launch:
    """A launch with one tile of rows a program. reads: tensors read; shared: bytes that all rows share; special: functions
    an element."""
    programs = -(-M // config.block_m)
    held = _resident(kernel, config)
    row = N * itemsize
    read = reads * M * row
    resident = min(programs, held * gpu.sms)
    reread = _missed(read, min(programs, held * gpu.sms) * reads * row, gpu) if config.chunked else 0.0
    ins = _instructions(kernel, config, N, itemsize)
    tile = config.block_m * (config.block_n * itemsize if config.chunked else row) * reads
    busy = min(1.0, programs / gpu.sms)
    limits = {
        "memory": (read + M * row + shared + reread) / gpu.copy,
        "issue": gpu.issue(programs, ins, config.num_warps) / busy,
        "special functions": gpu.special(special * M * N) / busy,
        "in flight": (read + reread) * gpu.latency / (resident * tile * counts.DUTY),
    }
    if held == 1 and not config.chunked:
        alone = ins * config.num_warps / (4 * gpu.issue_share * gpu.clock)
        one = gpu.latency + (reads + 1) * row * config.block_m / gpu.sm_bytes + alone
        limits["chain"] = one * max(1.0, programs / gpu.sms)
    return Launch(kernel, limits, last_wave(programs, held * gpu.sms, counts.LAST_WAVE_FELT), gpu.launch, gpu.norm)


def _elements(config: RowConfig) -> float:
    return config.block_m * config.block_n / (32 * config.num_warps)


def _instructions(kernel: str, config: RowConfig, N: int, itemsize: int) -> float:
    """Instructions of a warp for a whole tile of rows."""
    edges = N * itemsize % 16 != 0
    if edges and kernel in counts.EDGES and config.block_n <= 512:
        return counts.EDGES[kernel] * _elements(config)
    count = counts.ROWS[kernel, config.variant](_elements(config))
    if config.chunked:
        return count * -(-N // config.block_n)
    return count * (counts.EDGES_LONG if edges else 1.0)


def _resident(kernel: str, config: RowConfig) -> int:
    """Programs that an SM holds."""
    base, per = counts.REGISTERS[kernel if kernel in counts.REGISTERS and not config.chunked else config.variant]
    registers = max(24, base + per * _elements(config)) * 32 * config.num_warps
    return max(1, min(32, WARPS_AN_SM // config.num_warps, int(REGISTERS_AN_SM // registers)))


def _missed(read: float, working_set: float, gpu: Gpu) -> float:
    """Bytes of a second read that L2 no longer holds, with so many bytes read between the two passes by all programs."""
    return read * max(0.0, 1.0 - gpu.l2_share * gpu.l2_bytes / working_set)


def _uneven(trips: float, programs: int) -> float:
    """The factor of a persistent grid in which some programs make one trip more than others."""
    each = trips / programs
    return -(-trips // programs) / each if each > 1 else 1.0
