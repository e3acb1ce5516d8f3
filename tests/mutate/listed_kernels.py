"""Faults in kernels, as somebody might make them."""

from __future__ import annotations

from .mutant import Replacement, Selection, aten, interpreted

OFFSETS = aten("kernels/test_offsets.py")


def softmax(variant: str) -> Selection:
    return interpreted("rows_softmax", f"test_softmax_forward[{variant}")


def layer_norm(variant: str) -> Selection:
    return interpreted("rows_layer_norm", f"test_layer_norm[{variant}")


def matmul(test: str) -> Selection:
    return interpreted("linear_variants", test)


def sample(op: str, names: str) -> Selection:
    return interpreted("contract", f"test_within_contract[{op} and ({names})")


def kernel(
    id: str, fault: str, file: str, inside: str, old: str, new: str, *runs: Selection, equivalent: str = ""
) -> Replacement:
    return Replacement(id, "kernels", fault, f"kernels/{file}.py", runs, equivalent, inside, old, new)


MUTANTS = (
    kernel(
        "K01", "softmax loads 0 outside the row", "softmax/softmax", "softmax_fwd_kernel",
        'x = tl.load(x_ptrs, mask=mask, other=float("-inf"))', "x = tl.load(x_ptrs, mask=mask, other=0.0)", softmax("tile-odd"),
    ),
    kernel(
        "K02", "online softmax subtracts a maximum of -inf", "softmax/softmax", "softmax_fwd_chunked_kernel",
        'shift = tl.where(new_max == float("-inf"), 0.0, new_max)', "shift = new_max", softmax("chunked-special"), sample("softmax-float32", "masked or special"),
    ),
    kernel(
        "K03", "eps outside the root", "norm/layer_norm", "layer_norm_fwd_kernel",
        "tl.sqrt(sq_dev / N + eps)", "(tl.sqrt(sq_dev / N) + eps)", interpreted("rows_eps"), sample("layer_norm-float32", "tiny_spread or eps"),
    ),
    kernel(
        "K04", "eps outside the root, in a cluster", "norm/layer_norm_cluster", "layer_norm_fwd_cluster_kernel",
        "tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)", "(tl.sqrt(tl.sum(centred * centred, axis=0) / N) + eps)",
        interpreted("rows_eps"), interpreted("rows_layer_norm", "clusters"),
    ),
    kernel(
        "K05", "32-bit rows in softmax", "softmax/softmax", "softmax_fwd_kernel",
        "tl.program_id(0).to(tl.int64) * BLOCK_M", "tl.program_id(0) * BLOCK_M", OFFSETS,
    ),
    kernel(
        "K06", "32-bit rows in layer norm's backward", "norm/layer_norm_bwd", "layer_norm_bwd_kernel",
        "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)", OFFSETS,
    ),
    kernel(
        "K07", "32-bit rows in the product with an activation's derivative", "linear/linear_bwd", "linear_dact_kernel",
        "rows = tile_m.to(tl.int64) * BLOCK_M", "rows = tile_m * BLOCK_M", OFFSETS,
    ),
    kernel(
        "K08", "32-bit start of a part of K", "linear/linear_splitk", "linear_split_k_kernel",
        "first = split.to(tl.int64) * k_per_split", "first = split * k_per_split", OFFSETS,
    ),
    kernel(
        "K09", "each step over rows takes the first tile", "linear/linear_gated_bwd", "gate_bwd_kernel",
        "rows = start + tl.arange(0, BLOCK_M)", "rows = first + tl.arange(0, BLOCK_M)",
        interpreted("many_rows", "gated"), matmul("gated"),
    ),
    kernel(
        "K10", "products accumulate in fp16", "linear/linear_tiles", "pointer_product",
        "acc = multiply(x, w, acc, PRECISION, IMPRECISE, WIDEN)",
        "acc = multiply(x, w, acc, PRECISION, IMPRECISE, WIDEN).to(tl.float16).to(tl.float32)", matmul("long_sums"),
    ),
    kernel(
        "K11", "a bias gradient accumulates in fp16", "linear/linear_bwd", "linear_act_bwd_kernel",
        "db += dpre", "db = (db + dpre).to(tl.float16).to(tl.float32)",
        interpreted("many_rows", "linear"), sample("linear-float32", "relu or gelu or bias"),
    ),
    kernel(
        "K12", "variance as E[x^2] - E[x]^2", "norm/layer_norm", "layer_norm_fwd_kernel",
        "sq_dev = sum_of_squares(centred, mask, 1)",
        "sq_dev = sum_of_squares(centred, mask, 1) if EDGES else tl.sum(x * x, axis=1) - total * mean", sample("layer_norm-float32", "mean_300"), layer_norm("tile-aligned"),
    ),
    kernel(
        "K13", "gelu' is that of 4 beyond 4", "linear/activations", "activation_grad",
        'if ACT == "relu":', 'if ACT == "gelu":\n        x = tl.minimum(x, 4.0)\n    if ACT == "relu":', sample("linear-float32", "gelu"), sample("mlp-float32", "gelu"),
    ),
    kernel(
        "K14", "silu' is that of -12 below -12", "linear/activations", "activation_grad",
        'if ACT == "relu":', 'if ACT == "silu":\n        x = tl.maximum(x, -12.0)\n    if ACT == "relu":', sample("linear-float32", "silu"), sample("mlp-float32", "silu"),
    ),
    kernel(
        "K15", "tanh' is that of 5 beyond 5", "linear/activations", "activation_grad",
        'if ACT == "relu":', 'if ACT == "tanh":\n        x = tl.minimum(x, 5.0)\n    if ACT == "relu":', sample("linear-float32", "tanh"), sample("mlp-float32", "tanh"),
    ),
    kernel(
        "K16", "the bias is added once for each part of K", "linear/linear_splitk", "linear_reduce_kernel",
        "acc += tl.load(part_ptr + s * size + offsets, mask=mask, other=0.0).to(tl.float32)",
        "acc += tl.load(part_ptr + s * size + offsets, mask=mask, other=0.0).to(tl.float32)\n"
        "        if HAS_BIAS and s > 0:\n"
        "            acc += tl.load(b_ptr + cols * stride_b, mask=mask, other=0.0).to(tl.float32)",
        matmul("test_linear[split_k"),
    ),
    kernel(
        "K17", "scales of rows are read by columns", "linear/linear_splitk", "linear_reduce_kernel",
        "xs_ptr + rows * stride_xs", "xs_ptr + cols * stride_xs", matmul("fp8"),
    ),
    kernel(
        "K19", "a column sum drops the last part of its rows", "reduce", "column_sum_kernel",
        "tl.range(0, P, BLOCK_P)", "tl.range(0, tl.maximum(P // BLOCK_P, 1) * BLOCK_P, BLOCK_P)", interpreted("many_rows", "partial"),
    ),
    kernel(
        "K20", "the second of two column sums begins elsewhere", "reduce", "column_sum_kernel",
        "which.to(tl.int64) * P * stride_pp", "which.to(tl.int64) * stride_pp", interpreted("many_rows", "partial"),
    ),
    kernel(
        "K21", "the second loop reads dy with y's stride", "softmax/softmax_inner", "softmax_bwd_inner_kernel",
        "dy = tl.load(dy_ptrs + rows[:, None] * stride_dyn, mask=mask, other=0.0).to(tl.float32)\n        dx =",
        "dy = tl.load(dy_ptrs + rows[:, None] * stride_yn, mask=mask, other=0.0).to(tl.float32)\n        dx =",
        sample("softmax-float32", "dim1 or dim0"),
    ),
    kernel(
        "K22", "the last band of tiles is taken for a whole one", "linear/linear_tiles", "tile_of",
        "tl.minimum(tiles_m - band * GROUP_M, GROUP_M)", "tl.minimum(tiles_m, GROUP_M)", matmul("test_linear[pointer"),
    ),
    kernel(
        "K23", "a chunk's weight leaves out the edges", "norm/layer_norm", "layer_norm_fwd_chunked_kernel",
        "share = new / (seen + start + new)", "share = new / (start + new)", layer_norm("chunked-odd"),
    ),
    kernel(
        "K24", "every tile has the head of the first row", "norm/layer_norm", "layer_norm_fwd_kernel",
        "split_row(tile % VEC * stride_xm, N, VEC)", "split_row(tile * 0 * stride_xm, N, VEC)", layer_norm("tile-odd"),
    ),
    kernel(
        "K25", "the two halves of a pair are swapped in machine code", "rows", "pack",
        '" $0, $2, $1;"', '" $0, $1, $2;"', aten("ptx/test_kernels.py", "packed_rows_of_infinities and 65536"),
    ),
    kernel(
        "K26", "a strip of columns leaves out its last tile of rows", "norm/norm_bwd_wide", "norm_bwd_chunked_columns_kernel",
        "tl.range(group, tiles, groups", "tl.range(group, tiles - 1, groups", interpreted("rows_layer_norm", "chunked"),
    ),
    kernel(
        "K27", "a cluster adds the edges twice", "softmax/softmax_cluster", "softmax_fwd_cluster_kernel",
        "row_sum += tl.sum(e_edge, axis=0)", "row_sum += 2.0 * tl.sum(e_edge, axis=0)", softmax("cluster-odd"),
    ),
    kernel(
        "K28", "a row of zeros has a scale of 0", "norm/layer_norm_fp8", "_scale_of",
        "tl.where(top < LEAST_TOP, LEAST_TOP, top) / LARGEST", "top / LARGEST", interpreted("layer_norm_fp8"),
    ),
    kernel(
        "K29", "a bias gradient is summed after rounding", "linear/linear_tma", "_store_dact",
        "tl.sum(dpre, axis=0)", "tl.sum(dpre.to(OUT).to(tl.float32), axis=0)",
        matmul("test_mlp[tma"), sample("mlp-float16", "descriptors"),
    ),
    kernel(
        "K30", "what lies beyond K is multiplied too", "linear/linear_tiles", "pointer_product",
        "in_k = ks < K - start", "in_k = ks < K", matmul("test_linear[pointer"),
    ),
)  # fmt: skip
