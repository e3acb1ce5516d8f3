"""What the kernels cost, as small formulas of their sizes, for a forecast at once: where nothing can be compiled, or may not.

Read off SASS that Triton 3.6 to 3.9 compiled for sm_90 before the kernels were last made faster; `counted` has what a launch costs.

A row kernel's instructions are `base + per * elements` a warp, elements being those that one thread holds. The pairs of
numbers were read off compiled kernels (512, 1024 and 4096 columns; packed: 32768 and 65536); those marked belief were not.
"""

from __future__ import annotations

from typing import NamedTuple

from .gpus import MODEL


class Count(NamedTuple):
    """Instructions of a warp: base + per * (elements that a thread holds)."""

    base: float
    per: float

    def __call__(self, elements: float) -> float:
        return self.base + self.per * elements


ROWS = {
    ("softmax_fwd", "one_pass"): Count(77, 13.4),
    ("softmax_fwd", "packed"): Count(109, 20.7),
    ("softmax_fwd", "chunked"): Count(40, 28.0),  # both passes over a chunk of 16 elements a thread: 498
    ("softmax_bwd", "one_pass"): Count(77, 12.0),  # belief
    ("softmax_bwd", "packed"): Count(109, 21.0),  # belief
    ("softmax_bwd", "chunked"): Count(40, 24.0),  # belief
    ("layer_norm_fwd", "one_pass"): Count(90, 12.0),  # belief
    ("layer_norm_fwd", "packed"): Count(90, 20.0),  # belief
    ("layer_norm_fwd", "chunked"): Count(40, 26.0),  # belief
    ("layer_norm_bwd", "one_pass"): Count(60, 21.0),  # 8 elements a thread: 228 a row
    ("layer_norm_bwd", "chunked"): Count(40, 38.0),  # 16 elements a thread, both passes: belief
    ("rms_norm_fwd", "one_pass"): Count(80, 9.0),
    ("rms_norm_fwd", "packed"): Count(80, 16.0),  # belief
    ("rms_norm_fwd", "chunked"): Count(40, 22.0),  # belief
    ("rms_norm_bwd", "one_pass"): Count(60, 16.0),  # 8 elements a thread: 189 a row
    ("rms_norm_bwd", "chunked"): Count(40, 32.0),  # belief
}
"""(kernel, variant) -> instructions of a warp for one tile, or for one chunk."""

EDGES = {"softmax_fwd": 39.0, "softmax_bwd": 30.0}
"""Instructions an element of a lane where short rows start at any address (197 columns: 312 and 240 a row)."""
EDGES_LONG = 1.10  # factor on packed rows with edges: 1572 instructions at 50257 columns

REGISTERS = {
    "one_pass": (20.0, 1.0),
    "packed": (16.0, 0.75),
    "chunked": (40.0, 0.0),
    "layer_norm_bwd": (32.0, 4.0),
    "rms_norm_bwd": (32.0, 4.0),
}
"""Registers of a thread: base + per * elements. They decide how many programs an SM holds."""

ACTIVATION_FWD = {
    "none": 0.0, "relu": 1.0, "relu2": 2.0, "quick_gelu": 11.0, "silu": 10.0, "sigmoid": 9.0, "tanh": 14.0, "gelu_tanh": 16.0, "gelu": 30.0,
}  # fmt: skip
"""Instructions an element in an epilogue; gelu from 5336 instructions of a 128 x 256 tile, the others beliefs."""
EPILOGUE = 11.0  # instructions an element for bias, conversion and the way to shared memory
SAVE_PRE = 2.0  # more where the pre-activation is stored
ACTIVATION_BWD = {"gelu": 396 / 8, "gelu_tanh": 248 / 8, "silu": 199 / 8, "none": 10.0, "relu": 14.0}
"""Instructions an element of the activation's backward loop; gelu, gelu_tanh and silu counted."""
ACTIVATION_BWD_ELSE = 25.0
FP8_DRAIN = 136.0  # instructions a step of K in which partial sums of 128 products join the fp32 sum

DUTY_PERSISTENT, DUTY = MODEL["duty_persistent"], MODEL["duty"]
LAST_WAVE_FELT = MODEL["last_wave_felt"]
TENSOR_SHARE = {"ours": MODEL["tensor_share"], "cublas": MODEL["cublas_share"], "fp8": MODEL["tensor_share"]}
LEAST_CUBLAS = MODEL["least_cublas"]
WEIGHT_STREAM = MODEL["weight_stream"]
