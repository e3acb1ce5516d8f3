"""Faults in what launches kernels, in gradients, in fuse and in export, as somebody might make them."""

from __future__ import annotations

from .mutant import Replacement, Selection, aten, interpreted

LINEAR = "ops/linear"
GRIDS = aten("runtime/test_plans.py")
STUB = aten("runtime/test_launch.py", "what_triton_launches")
ENGINES = aten("export/test_engine.py export/test_safety.py", "hash or manifest or changed or not_loaded or agrees")
QUANTIZE = aten("export/test_quantize.py", "not minilm and not engine and not modelopt")


def fault(
    id: str, area: str, fault: str, path: str, inside: str, old: str, new: str, *runs: Selection, equivalent: str = ""
) -> Replacement:
    path = path if path.startswith(("export/", "kernels/")) else f"fused_ops/{path}"
    return Replacement(id, area, fault, f"{path}.py", runs, equivalent, inside, old, new)


LAUNCH = (
    fault(
        "L01", "launch", "rows count as aligned whatever their strides", "kernels/rows", "row_vectors",
        "if N % vec == 0 and all(stride % vec == 0 for stride in row_strides):", "if N % vec == 0:",
        aten("kernels/test_rows.py"),
    ),
    fault(
        "L02", "launch", "a warm launch takes every address for aligned", "_runtime/compiled", "run",
        "if address & 15:", "if False:", STUB,
    ),
    fault(
        "L03", "launch", "a warm launch takes every size for a multiple of 16", "_runtime/compiled", "run",
        "key = 8 * key + (0 if not size & 15 else 1 if size == 1 else 2) + (4 if size > _INT32_MAX else 0)", "key = 0", STUB,
    ),
    fault(
        "L04", "launch", "a plan of one device is launched on another", "_runtime/launch", "launch",
        "if direct and planned.device == _current_device():", "if direct:", GRIDS, STUB,
    ),
    fault(
        "L05", "launch", "a grid one too large at exact multiples", "_runtime/launch", "launch",
        "-(-M // planned.block) * planned.across", "(M // planned.block + 1) * planned.across", GRIDS,
    ),
    fault(
        "L06", "launch", "plans stay after a configuration was forced", "_runtime/tables", "force",
        "forget_plans()", "pass", aten("tools/test_tune.py", "replaces"), interpreted("rows_choice", "tuning and softmax_fwd"),
    ),
    fault(
        "L07", "launch", "plans stay after a GPU refused a cluster", "_runtime/clusters", "give_up",
        "forget_plans()", "pass", aten("runtime/test_clusters.py", "refuses"),
    ),
    fault(
        "L08", "launch", "a plan's key lacks the bias' dtype", "ops/norm/layer_norm_launch", "_launch_fwd",
        "x.dtype, w_dtype, b_dtype, mean", "x.dtype, w_dtype, b_dtype and w_dtype, mean", GRIDS,
    ),
    fault(
        "L09", "launch", "the memory of one launch is the next one's too", "_runtime/compiled", "_scratch_of",
        "(lambda grid: scratch(grid * size, device))", "functools.cache(lambda grid: scratch(grid * size, device))",
        aten("runtime/test_launch.py runtime/test_launch_path.py", "scratch"),
    ),
    fault(
        "L10", "launch", "TMA writes rows that begin at no 16 bytes", f"{LINEAR}/matmul_plan", "access",
        "self.N * max(self.itemsize, 2) % 16 or ", "", interpreted("linear_variants", "cannot"),
    ),
    fault(
        "L11", "launch", "what was tuned is not read again", "_runtime/tables", "save", "forget_tables()", "pass",
        aten("runtime/test_tables.py"), aten("tools/test_tune.py"),
    ),
    fault(
        "L12", "launch", "fp8 products are summed in the tensor core's own accumulator", f"{LINEAR}/linear_plan",
        "_linear_launches", "min(FP8_CHUNK, config.block_k) if", "1 << 30 if", GRIDS, aten("ops/test_linear_family.py", "fp8 or choice"),
    ),
    fault(
        "K18", "launch", "partial rows of programs that do not exist", "ops/norm/layer_norm_launch", "layer_norm_bwd_launch",
        "planned.grid(M) // planned.across, N)", "planned.most, N)", interpreted("rows_layer_norm", "backward_of_what_is_needed"), interpreted("contract", "test_within_contract[layer_norm-float32 and no_"),
    ),
)  # fmt: skip

AUTOGRAD = (
    fault(
        "A01", "autograd", "what dw needs is kept for dx", f"{LINEAR}/linear", "_forward",
        "x if need_dw else None, weight if need_dx else None", "x if need_dx else None, weight if need_dw else None", aten("ops/test_autograd.py", "every_subset and linear"),
    ),
    fault(
        "A02", "autograd", "nothing is kept to compute the hidden layer again", f"{LINEAR}/mlp", "_forward",
        "need_dpre or (need_dw2 and recompute), need_dw2", "need_dpre, need_dw2", aten("ops/test_linear_family.py", "every_subset and recompute"),
    ),
    fault(
        "A03", "autograd", "the second order misses the way through y", "ops/softmax/softmax_reference", "differentiable_bwd",
        "product - y * product", "product - y.detach() * product", aten("ops/test_autograd.py", "softmax"),
    ),
    fault(
        "A04", "autograd", "db comes in input's dtype", "ops/norm/layer_norm", "_LayerNorm",
        "bias_dtype = None if bias is None else bias.dtype", "bias_dtype = None",
        aten("ops/test_gradient_dtypes.py"), aten("torch/test_autocast.py", "layer_norm"),
    ),
    fault(
        "A05", "autograd", "the gate's second order takes g for act(g)", f"{LINEAR}/gated_linear", "_GatedLinear",
        "dy * activate(g, ctx.activation)", "dy * g", aten("ops/test_penalty.py", "gated"), aten("ops/test_autograd.py ops/test_linear_family.py", "gated and gradients"),
    ),
    fault(
        "A06", "autograd", "an mlp's second order drops what flows through the hidden layer", f"{LINEAR}/mlp", "_Mlp",
        "dh = add(through, dh)", "dh = through", aten("ops/test_penalty.py"), aten("ops/test_autograd.py", "mlp"),
    ),
)  # fmt: skip

FUSE = (
    fault(
        "F01", "fuse", "a variable that is read again is taken into a fused call", "_fuse/flow", "definition",
        "return None if alive else Definition(", "return Definition(",
        aten("fuse/test_matching.py"), aten("fuse/test_forwards.py"),
    ),
    fault(
        "F02", "fuse", "backward pre-hooks are not seen", "_fuse/conditions", "",
        '    "_backward_pre_hooks": "a backward pre-hook",\n', "", aten("fuse/test_refusals.py", "hook"),
    ),
    fault(
        "F03", "fuse", "a gate whose two halves have different inputs", "_fuse/calls", "gated",
        "if other is x and product in _PRODUCTS", "if product in _PRODUCTS", aten("fuse/test_refusals.py", "gate"), aten("fuse/test_blocks.py"),
    ),
    fault(
        "F04", "fuse", "a dropout that is active is passed over", "_fuse/calls", "is_idle",
        " and (not called.training or called.p == 0)", "", aten("fuse/test_blocks.py"), aten("fuse/test_forwards.py"),
    ),
    fault(
        "F05", "fuse", "backward hooks set after fuse are passed by", "_fuse/calls", "operands_of",
        'or state["_backward_hooks"] or state["_backward_pre_hooks"]', "", aten("fuse/test_hooks.py"),
    ),
    fault(
        "F06", "fuse", "gelu's approximation is not looked at", "_fuse/activations", "_function",
        '_gelu(options.get("approximate", "none"))', '_gelu("none")', aten("fuse/test_matching.py"), aten("fuse/test_forwards.py"),
    ),
)  # fmt: skip

EXPORT = (
    fault(
        "E01", "export", "opsets that torch does not write are let through", "export/onnx/exporter", "_check_arguments",
        "if opset not in OPSETS:", "if opset < 18:", aten("export/test_onnx_refusals.py", "opset"),
    ),
    fault(
        "E02", "export", "nothing is kept in fp32", "export/onnx/precision", "convert_precision",
        "_kept_nodes(graph, keep_fp32)", "_kept_nodes(graph, ())", aten("export/test_onnx_precision.py"),
    ),
    fault(
        "E03", "export", "TensorRT is told the largest shape as the usual one", "export/tensorrt/profiles", "add_profiles",
        "setter(tensor.name, *profile[tensor.name])",
        "low, _, high = profile[tensor.name]\n            setter(tensor.name, low, high, high)", aten("export/test_tensorrt.py"),
    ),
    fault(
        "E04", "export", "files are written in place", "export/files/atomic", "output",
        "staged = folder / target.name", "staged = target", aten("export/test_files.py"),
    ),
    fault(
        "E05", "export", "a manifest's hash is not compared", "export/files/manifest", "check_hash",
        'manifest["sha256"] != actual', "False", ENGINES,
    ),
    fault(
        "E06", "export", "a pinned hash is compared by its beginning", "export/files/manifest", "check_hash",
        "sha256.lower() != actual", "sha256.lower()[:8] != actual[:8]", ENGINES,
    ),
    fault(
        "E07", "export", "external data may be a link", "export/files/atomic", "_check_external_data",
        "if any(p.is_symlink() for p in (file, *file.parents) if p != folder and folder in p.parents):", "if False:",
        aten("export/test_files.py export/test_safety.py", "external"),
    ),
    fault(
        "Q01", "export", "the command calibrates on what it holds out", "export/cli/models", "quantize",
        "used = batches[: len(batches) - kept]", "used = batches", aten("export/test_quantize_choices.py"), aten("export/test_cli.py", "held_out"),
    ),
    fault(
        "Q02", "export", "the calibration method is ignored", "export/quantize/quantizer", "_calibrate",
        "feeds, method=method,", 'feeds, method="minmax",', QUANTIZE,
    ),
    fault(
        "Q03", "export", "one scale a weight where one a column is asked for", "export/quantize/quantizer", "quantize_onnx",
        "calibrated.ranges, names, per_channel)", "calibrated.ranges, names, False)", aten("export/test_quantize_choices.py"), QUANTIZE,
    ),
    fault(
        "Q04", "export", "the result is measured on calibration data", "export/quantize/quantizer", "quantize_onnx",
        'as_feeds(op, "evaluation", evaluation, _inputs(calibrated.model))', "calibrated.feeds",
        aten("export/test_quantize_choices.py"), QUANTIZE,
    ),
)  # fmt: skip

MUTANTS = (*LAUNCH, *AUTOGRAD, *FUSE, *EXPORT)
