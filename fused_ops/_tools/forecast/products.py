"""Forecasts of matrix products with an epilogue, and of their backwards.

A persistent program has its SM alone: main loop, then epilogue, one after the other, tile after tile. So a launch takes as
many tiles as the busiest SM has, times both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import counts
from .gpus import Gpu
from .limits import Launch, last_wave
from .rows import PARTIAL_BYTES, column_sum, elementwise

if TYPE_CHECKING:
    from ...kernels.config import MatmulConfig

_CUBLAS_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.88))  # rows, columns, share of the main loop's rate


def linear_fwd(M: int, N: int, K: int, itemsize: int, activation: str, save_pre: bool, gpu: Gpu) -> list[Launch]:
    """act(x @ w^T + b) with x (M, K) and w (N, K)."""
    if itemsize == 4:
        launches = [cublas(M, N, K, itemsize, gpu)]
        return launches + [elementwise("epilogue", M * N, 2 + save_pre, itemsize, counts.EPILOGUE, gpu)]
    if activation == "none" and not save_pre and itemsize == 2:
        return [cublas(M, N, K, itemsize, gpu)]
    use = "fp8" if itemsize == 1 else "fwd"
    config = _config(M, N, K, itemsize, use, gpu)
    out = 2 * M * N * (1 + save_pre)  # 16 bits an element
    nbytes = (M * K + N * K) * itemsize + out
    if config.kind == "split_k":
        return _split_k(config, M, N, nbytes, gpu)
    per = counts.EPILOGUE + counts.ACTIVATION_FWD.get(activation, 20.0) + counts.SAVE_PRE * save_pre
    return [ours("linear", config, M, N, K, itemsize, nbytes, per, gpu)]


def linear_bwd(M: int, N: int, K: int, itemsize: int, activation: str, gpu: Gpu) -> list[Launch]:
    """dpre and db, then dx and dw by cuBLAS."""
    first = _act_bwd(M, N, itemsize, activation, 3.0 if activation != "none" else 1.0, gpu)
    return [*first, cublas(M, K, N, itemsize, gpu), cublas(N, K, M, itemsize, gpu)]


def gated_fwd(M: int, N: int, K: int, itemsize: int, activation: str, save_pre: bool, gpu: Gpu) -> list[Launch]:
    """act(x @ wg^T) * (x @ wu^T)."""
    if itemsize == 4:
        return [*[cublas(M, N, K, itemsize, gpu)] * 2, elementwise("gate", M * N, 3.0, itemsize, 20.0, gpu)]
    config = _config(M, N, K, itemsize, "gated", gpu)
    nbytes = (M * K + 2 * N * K + M * N * (1 + 2 * save_pre)) * itemsize
    per = 2 * counts.EPILOGUE + counts.ACTIVATION_FWD.get(activation, 20.0) + 2 * counts.SAVE_PRE * save_pre
    return [ours("gated", config, M, N, K, itemsize, nbytes, per, gpu, products=2)]


def gated_bwd(M: int, N: int, K: int, itemsize: int, activation: str, gpu: Gpu) -> list[Launch]:
    """dg and du in one kernel, dx from two products in one kernel, two weight gradients by cuBLAS."""
    per = counts.ACTIVATION_BWD.get(activation, counts.ACTIVATION_BWD_ELSE) + 12
    gate = elementwise("gate_bwd", M * N, 5.0, itemsize, per, gpu)
    weights = [cublas(N, K, M, itemsize, gpu)] * 2
    if itemsize == 4:
        return [gate, cublas(M, K, N, itemsize, gpu), cublas(M, K, N, itemsize, gpu), *weights]
    config = _config(M, K, N, itemsize, "fwd", gpu)
    nbytes = (2 * M * N + 2 * N * K + M * K) * itemsize
    return [gate, ours("product_sum", config, M, K, 2 * N, itemsize, nbytes, counts.EPILOGUE, gpu), *weights]


def mlp_fwd(M: int, H: int, K: int, itemsize: int, activation: str, save_pre: bool, gpu: Gpu) -> list[Launch]:
    """act(x @ w1^T + b1) @ w2^T + b2 with w1 (H, K) and w2 (K, H)."""
    return [*linear_fwd(M, H, K, itemsize, activation, save_pre, gpu), cublas(M, K, H, itemsize, gpu)]


def mlp_bwd(M: int, H: int, K: int, itemsize: int, activation: str, gpu: Gpu) -> list[Launch]:
    """db2; dpre and db1 from the epilogue of dy @ w2; dw2, dx and dw1 by cuBLAS."""
    launches = [elementwise("column sums", M * K, 1.0, itemsize, 10.0, gpu)]
    per = counts.EPILOGUE + counts.ACTIVATION_BWD.get(activation, counts.ACTIVATION_BWD_ELSE)
    if itemsize == 4:
        launches += [cublas(M, H, K, itemsize, gpu), *_act_bwd(M, H, itemsize, activation, 3.0, gpu)]
    else:
        config = _config(M, H, K, itemsize, "dact", gpu)
        nbytes = (M * K + H * K + 2 * M * H) * itemsize
        launches += [ours("dact", config, M, H, K, itemsize, nbytes, per, gpu), column_sum(-(-M // config.block_m), H, gpu)]
    return [*launches, cublas(K, H, M, itemsize, gpu), cublas(M, K, H, itemsize, gpu), cublas(H, K, M, itemsize, gpu)]


def ours(
    name: str, config: MatmulConfig, M: int, N: int, K: int, itemsize: int, nbytes: float, per_element: float, gpu: Gpu,
    products: int = 1,
) -> Launch:  # fmt: skip
    """A kernel of ours over tiles of (M, N). per_element: instructions an element of the epilogue; products: weights."""
    tiles = -(-M // config.block_m) * -(-N // config.block_n)
    sm_rate = gpu.rates[itemsize] / gpu.sms * counts.TENSOR_SHARE["fp8" if itemsize == 1 else "ours"]
    steps = -(-K // config.block_k)
    main = products * 2 * config.block_m * config.block_n * steps * config.block_k / (sm_rate * _tile_speed(config, products))
    slots = 4 * gpu.issue_share * gpu.clock  # of an SM, a second
    if itemsize == 1:
        main += steps * counts.FP8_DRAIN * config.num_warps / slots
    epilogue = config.block_m * config.block_n / 32 * per_element / slots
    together = 1 if config.kind == "tma" else 2  # pointer tiles: one program's epilogue under another's products
    one = gpu.latency + main + epilogue if together == 1 else max(main, epilogue) + gpu.latency / 2
    busiest = math.ceil(tiles / gpu.sms) if tiles > gpu.sms else 1
    return Launch(name, {"tensor": busiest * one, "memory": nbytes / gpu.copy}, floor=gpu.launch, norm=gpu.norm)


def cublas(M: int, N: int, K: int, itemsize: int, gpu: Gpu) -> Launch:
    """A product by cuBLAS: the better of a few tiles, or K split where none fills the GPU."""
    nbytes = (M * K + N * K + M * N) * itemsize
    share = max(speed * M * N / (_waves(M, N, bm, bn, gpu) * gpu.sms * bm * bn) for bm, bn, speed in _CUBLAS_TILES)
    share = max(share, counts.LEAST_CUBLAS)
    few = min(M, N) <= 64  # a large weight's bytes are what takes time
    seconds = 0.0 if few else 2 * M * N * K / (gpu.rates[itemsize] * counts.TENSOR_SHARE["cublas"] * share)
    memory = nbytes / gpu.copy / (counts.WEIGHT_STREAM if few else 1.0)
    return Launch("cublas", {"tensor": seconds, "memory": memory}, floor=gpu.launch, norm=gpu.norm)


def _waves(M: int, N: int, block_m: int, block_n: int, gpu: Gpu) -> int:
    return math.ceil(-(-M // block_m) * -(-N // block_n) / gpu.sms)


def _tile_speed(config: MatmulConfig, products: int) -> float:
    """The main loop's rate in this tile over the largest's: small tiles read more shared memory a product."""
    area = config.block_m * config.block_n * products
    return 1.0 if area >= 128 * 256 else 0.9 if area >= 128 * 128 else 0.7 if area >= 64 * 128 else 0.5


def _config(M: int, N: int, K: int, itemsize: int, use: str, gpu: Gpu) -> MatmulConfig:
    from ...kernels.linear.linear_config import linear_config

    return linear_config(M, N, K, itemsize, gpu.capability, gpu.sms, "tma", use)


def _split_k(config: MatmulConfig, M: int, N: int, nbytes: float, gpu: Gpu) -> list[Launch]:
    """Few rows: the weights are read once, partial sums go through L2 to a second launch."""
    tiles = -(-M // config.block_m) * -(-N // config.block_n) * config.splits
    memory = {"memory": nbytes / gpu.copy / counts.WEIGHT_STREAM}
    first = Launch("split_k", memory, last_wave(tiles, 4 * gpu.sms), gpu.launch, gpu.norm)
    rate = gpu.sms * gpu.sm_bytes / 4
    partial = config.splits * M * N * PARTIAL_BYTES / rate + gpu.latency
    return [first, Launch("reduce", {"memory": partial}, floor=gpu.launch, norm=gpu.norm)]


def _act_bwd(M: int, N: int, itemsize: int, activation: str, tensors: float, gpu: Gpu) -> list[Launch]:
    """dpre and the partial sums of db, in more programs than fit at once, then their sum."""
    from ...kernels.linear.linear_bwd import ACT_BWD_BLOCK_N, ACT_BWD_WARPS, linear_act_bwd_rows

    rows = linear_act_bwd_rows(M, N, gpu.sms)
    partial_rows = -(-M // rows)
    programs = partial_rows * -(-N // ACT_BWD_BLOCK_N)
    per = counts.ACTIVATION_BWD.get(activation, counts.ACTIVATION_BWD_ELSE)
    limits = elementwise("act_bwd", M * N, tensors, itemsize, per, gpu).limits
    places = 48 // ACT_BWD_WARPS * gpu.sms  # 40 registers a thread
    main = Launch("act_bwd", limits, last_wave(programs, places), gpu.launch, gpu.norm)
    return [main, column_sum(partial_rows, N, gpu)]
