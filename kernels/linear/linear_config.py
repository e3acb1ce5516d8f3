"""Which matmul kernel runs, with which tiles: pure functions of sizes, itemsize, capability and SM count.

The one place where capability decides. `access` says what the operands allow: "tma" (16-byte aligned pointers and row
strides, one stride 1), "aligned" (128-bit loads), or "any".

    capability     M > 64, 16 bits or fewer              M <= 64, K >= 512          fp32
    9.x, 10.x      tma (persistent), else pointer        split_k                    pointer
    8.x, 12.x      pointer                               split_k                    pointer
"""

from __future__ import annotations

import functools

from ..config import MatmulConfig, cdiv, next_power_of_2

SMALL_M = 64  # up to here the weights are what is read: K is split so that every SM reads some
LEAST_K_PER_SPLIT = 256
SHALLOW_K = 1024  # up to here the epilogue takes so long beside the products that two programs an SM are faster
TMA_CAPABILITIES = (9, 10)  # major numbers with TMA, and with the shared memory that its tiles take

# (tile, its speed on a full chip relative to the largest): beliefs until measured on the GPU at hand. Sides are powers of two:
# a 64x256 tile would fill the last wave better in 2 of 110 shapes of up to 1024 rows, and none of 192 can be had.
_SMALL_TMA_TILES = (
    (MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, kind="tma", programs=2), 0.65),
    (MatmulConfig(64, 64, 64, num_warps=4, num_stages=4, kind="tma", programs=2), 0.45),
)
_SHALLOW_TMA_TILES = {
    "fwd": (
        (MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, kind="tma", subtiles=2, programs=2), 1.0),
        *_SMALL_TMA_TILES,
    ),
    "dact": (
        (MatmulConfig(128, 128, 64, num_warps=4, num_stages=3, kind="tma", subtiles=4, programs=2), 1.0),
        (MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, kind="tma", subtiles=4), 0.7),
        (MatmulConfig(64, 64, 64, num_warps=4, num_stages=4, kind="tma", subtiles=2), 0.5),
    ),
}
_TMA_TILES = {
    "fwd": (
        (MatmulConfig(128, 256, 64, num_warps=8, num_stages=4, kind="tma", subtiles=2), 1.0),
        (MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, kind="tma", subtiles=2), 0.85),
        *_SMALL_TMA_TILES,
    ),
    "dact": (  # the saved tile and the derivative take registers: in halves, 128x256 would spill
        (MatmulConfig(128, 256, 64, num_warps=8, num_stages=3, kind="tma", subtiles=4), 1.0),
        (MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, kind="tma", subtiles=2), 0.9),
        (MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, kind="tma", subtiles=4), 0.7),
        (MatmulConfig(64, 64, 64, num_warps=4, num_stages=4, kind="tma", subtiles=2), 0.5),
    ),
    "gated": (  # block_n columns of both weights: two accumulators
        (MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, kind="tma", subtiles=2), 1.0),
        (MatmulConfig(64, 64, 64, num_warps=4, num_stages=4, kind="tma"), 0.6),
    ),
    "fp8": (  # partial sums of 128 products join an fp32 sum: a second accumulator
        (MatmulConfig(128, 128, 128, num_warps=8, num_stages=4, kind="tma", subtiles=2), 1.0),
        (MatmulConfig(64, 128, 128, num_warps=4, num_stages=4, kind="tma"), 0.7),
        (MatmulConfig(64, 64, 128, num_warps=4, num_stages=4, kind="tma"), 0.5),
    ),
}
_TMA_TILES["sum"] = _TMA_TILES["fwd"]
_POINTER_TILES = {
    "fwd": (
        (MatmulConfig(128, 128, 32, num_warps=8, num_stages=4), 1.0),
        (MatmulConfig(64, 128, 32, num_warps=4, num_stages=4), 0.8),
        (MatmulConfig(64, 64, 32, num_warps=4, num_stages=4), 0.6),
    ),
    "dact": (
        (MatmulConfig(128, 64, 32, num_warps=8, num_stages=4), 1.0),
        (MatmulConfig(64, 64, 32, num_warps=4, num_stages=4), 0.75),
    ),
    "fp8": (
        (MatmulConfig(128, 128, 64, num_warps=8, num_stages=3), 1.0),
        (MatmulConfig(64, 128, 64, num_warps=4, num_stages=3), 0.8),
        (MatmulConfig(64, 64, 64, num_warps=4, num_stages=3), 0.6),
    ),
}
_POINTER_TILES |= {"gated": _POINTER_TILES["dact"], "sum": _POINTER_TILES["fwd"]}
_ANY_TILES = {  # scalar loads: each element's pointer takes registers
    "fwd": (
        (MatmulConfig(128, 64, 32, num_warps=8, num_stages=3), 1.0),
        (MatmulConfig(64, 64, 32, num_warps=4, num_stages=3), 0.75),
    ),
    "dact": ((MatmulConfig(64, 32, 32, num_warps=4, num_stages=3), 1.0),),
}
_ANY_TILES |= {"gated": _ANY_TILES["dact"], "fp8": _ANY_TILES["fwd"], "sum": _ANY_TILES["fwd"]}


def _fastest(tiles: tuple[tuple[MatmulConfig, float], ...], M: int, N: int, sms: int) -> MatmulConfig:
    """The tile whose speed, times the part of the chip and of its tiles that does useful work, is greatest."""

    def rate(entry: tuple[MatmulConfig, float]) -> float:
        tile, speed = entry
        waves = cdiv(cdiv(M, tile.block_m) * cdiv(N, tile.block_n), sms)
        return speed * M * N / (waves * sms * tile.block_m * tile.block_n)

    return max(tiles, key=rate)[0]


@functools.lru_cache(maxsize=4096)
def linear_config(
    M: int, N: int, K: int, itemsize: int, capability: tuple[int, int], sms: int, access: str, use: str = "fwd"
) -> MatmulConfig:
    """The configuration of (M, K) @ (K, N) with itemsize bytes an element.

    use: "fwd"; "dact", with dpre and dbias in the epilogue; "gated", with two weights; "sum", of two products; or "fp8".
    """
    if itemsize == 4:
        return MatmulConfig(64, 32 if access == "any" else 64, 32, num_warps=4, num_stages=3)
    if M <= SMALL_M:
        if use in ("fwd", "fp8") and K >= 2 * LEAST_K_PER_SPLIT:
            return _split_k(M, N, K, itemsize, sms, access)
        if access == "any":  # scalar loads: larger tiles spill
            block_n, block_k = {"gated": (32, 16), "dact": (32, 32)}.get(use, (64, 32))
        else:
            block_n, block_k = 64, 64
        return MatmulConfig(max(16, next_power_of_2(M)), block_n, block_k, num_warps=4, num_stages=3)
    if access == "tma" and capability[0] in TMA_CAPABILITIES:
        shallow = _SHALLOW_TMA_TILES if K <= SHALLOW_K else {}
        return _fastest(shallow.get(use) or _TMA_TILES[use], M, N, sms)
    found = (_ANY_TILES if access == "any" else _POINTER_TILES)[use]
    if use == "fp8" and access != "any" and capability[0] == 9:
        found = found[
            1:
        ]  # beside Hopper's partial sums 128x128 leaves no registers to gelu: 168 bytes spilled under Triton 3.9
    return _fastest(found, M, N, sms)


def _split_k(M: int, N: int, K: int, itemsize: int, sms: int, access: str) -> MatmulConfig:
    """Parts of K enough for two programs an SM, none shorter than LEAST_K_PER_SPLIT."""
    splits = max(1, min(cdiv(2 * sms, cdiv(N, 64)), K // LEAST_K_PER_SPLIT, 32))
    block_m = max(16, next_power_of_2(M))
    if access == "any":
        return MatmulConfig(block_m, 64, 32, num_warps=4, num_stages=3, kind="split_k", splits=splits)
    block_k = (256 if block_m == SMALL_M else 128) // itemsize
    num_warps = 8 if (block_m, itemsize) == (32, 1) else 4  # with 4 this tile spills under Triton 3.7 and 3.8
    return MatmulConfig(block_m, 64, block_k, num_warps=num_warps, num_stages=4, kind="split_k", splits=splits)
