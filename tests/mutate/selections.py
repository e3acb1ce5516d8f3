"""Which tests are to notice a change in a file."""

from __future__ import annotations

from .mutant import Selection, aten, interpreted

_SAMPLES = "test_within_contract"


def _samples(*ops: str, dtypes: str = "(float32 or bfloat16)") -> Selection:
    return interpreted("contract", f"{_SAMPLES} and ({' or '.join(ops)}) and {dtypes}")


_SOFTMAX = (interpreted("rows_softmax"), _samples("softmax", dtypes="float32"), interpreted("rows_memory", "softmax"))
_LAYER_NORM = (
    interpreted("rows_layer_norm"), interpreted("many_rows", "norm"), _samples("layer_norm", dtypes="float32"),
    interpreted("rows_memory", "layer_norm"),
)  # fmt: skip
_RMS_NORM = (
    interpreted("rows_rms_norm rows_eps", "rms_norm"),
    interpreted("many_rows", "rms_norm"),
    _samples("rms_norm"),
    aten("ptx/test_tiles.py"),
)
_MATMULS = (interpreted("linear_strides linear_variants many_rows"), _samples("linear", "mlp", dtypes="float32"))
_LAUNCH = (
    aten("runtime/test_plans.py runtime/test_launch_path.py runtime/test_clusters.py"),
    aten("runtime"),
    interpreted("rows_choice"),
    interpreted("many_rows"),
)
_GRADIENTS = (
    aten("ops/test_autograd.py ops/test_linear_family.py ops/test_penalty.py ops/test_gradient_dtypes.py"),
    aten("torch/test_partial_backward.py"),
)
_FUSE = (
    aten("fuse/test_matching.py fuse/test_forwards.py fuse/test_blocks.py fuse/test_fuse.py"),
    aten("fuse/test_flow.py fuse/test_forms.py fuse/test_source.py"),
    aten("fuse/test_hooks.py fuse/test_undo.py fuse/test_report.py fuse/test_layer_norms.py fuse/test_norm_formula.py"),
    aten("fuse/test_side_effects.py fuse/test_odd_classes.py fuse/test_other_forwards.py"),
)  # fmt: skip

# The longest beginning of a file's path decides.
RUNS: dict[str, tuple[Selection, ...]] = {
    "kernels/softmax/": _SOFTMAX,
    "kernels/softmax/softmax_inner": (_samples("softmax"), interpreted("properties", "softmax")),
    "kernels/norm/layer_norm": _LAYER_NORM,
    "kernels/norm/layer_norm_fp8": (interpreted("layer_norm_fp8"), aten("ptx/test_kernels.py", "without_gradients and first")),
    "kernels/norm/rms_norm": _RMS_NORM,
    "kernels/linear/": _MATMULS,
    "kernels/linear/activations": (_samples("linear", "mlp", dtypes="float32"), interpreted("properties", "linear")),
    "kernels/linear/linear_tma": (interpreted("linear_strides linear_variants"), aten("ptx/test_kernels.py", "tma")),
    "kernels/rows": (
        aten("kernels/test_rows.py"), interpreted("rows_softmax", "packed"), interpreted("rows_layer_norm"), interpreted("rows_choice rows_softmax"),
        aten("ptx/test_kernels.py", "packed"),
    ),
    "kernels/": (interpreted("many_rows"), interpreted("rows_memory", "layer_norm"), aten("kernels")),
    "fused_ops/_runtime/": _LAUNCH,
    "fused_ops/_runtime/tables": (aten("runtime/test_tables.py"), aten("runtime/test_plans.py", "measured"), aten("tools/test_tune.py"), interpreted("rows_choice")),
    "fused_ops/_runtime/tuned_kernels": (aten("tools/test_tune.py"), interpreted("rows_choice")),
    "fused_ops/_runtime/rows": (interpreted("many_rows needs", "linear or partial"), aten("runtime/test_plans.py")),
    "fused_ops/_runtime/settings": (aten("runtime"), aten("tools/test_explain.py tools/test_doctor.py")),
    "fused_ops/_runtime/backend": (aten("tools/test_explain.py ops/test_errors.py"), aten("runtime")),
    "fused_ops/ops/softmax/": (aten("runtime/test_plans.py", "softmax"), aten("runtime/test_clusters.py", "refusal"), interpreted("rows_softmax"), _samples("softmax"), interpreted("rows_choice")),
    "fused_ops/ops/norm/": (
        aten("runtime/test_plans.py", "norm"), interpreted("rows_layer_norm"), _samples("layer_norm", "rms_norm", dtypes="float32"),
        interpreted("rows_choice", "not softmax"),
    ),
    "fused_ops/ops/norm/rms": (_samples("rms_norm"), aten("runtime/test_plans.py"), aten("ptx/test_tiles.py")),
    "fused_ops/ops/norm/layer_norm_fp8": (interpreted("layer_norm_fp8"), aten("runtime/test_plans.py")),
    "fused_ops/ops/linear/": (
        aten("runtime/test_plans.py"), interpreted("linear_strides linear_variants needs"), aten("ops/test_linear_family.py"),
        interpreted("peak_memory"), _samples("linear", "mlp"),
    ),
    "fused_ops/ops/linear/matmul_gated": (interpreted("linear_strides linear_variants", "gated"), aten("runtime/test_plans.py", "gated")),
    "fused_ops/ops/linear/linear_launch": (interpreted("needs", "linear"), interpreted("linear_variants"), aten("runtime/test_plans.py", "linear")),
    "fused_ops/ops/linear/gated_linear_launch": (interpreted("needs linear_variants", "gated"), aten("runtime/test_plans.py", "gated")),
    "fused_ops/ops/linear/mlp_launch": (interpreted("needs linear_variants", "mlp"), aten("runtime/test_plans.py", "mlp")),
    "fused_ops/ops/linear/gradients": _GRADIENTS,
    "fused_ops/_torch/": (aten("torch/test_eager.py torch/test_transforms.py torch/test_ordinary.py"), *_GRADIENTS, aten("ops")),
    "fused_ops/_torch/sharding": (aten("torch/test_distributed.py"),),
    "fused_ops/_torch/flops": (aten("torch/test_profiling.py"),),
    "fused_ops/_torch/compile": (aten("torch/test_compile.py torch/test_inlining.py"),),
    "fused_ops/_torch/overrides": (aten("torch/test_subclasses.py torch/test_nested.py torch/test_fx.py"),),
    "fused_ops/_torch/spec": (aten("ops/test_registry.py ops/test_names.py torch/test_profiling.py"), aten("torch/test_distributed.py")),
    "fused_ops/_torch/arguments": (aten("ops/test_errors.py ops/test_arguments.py torch/test_ordinary.py torch/test_subclasses.py"),),
    "fused_ops/_torch/library": (aten("ops/test_registry.py torch/test_compile.py"),),
    "fused_ops/_fuse/": _FUSE,
    "fused_ops/_fuse/blocks": (aten("fuse/test_blocks.py"), aten("fuse/test_matching.py"), *_FUSE),
    "fused_ops/_fuse/calls": (aten("fuse/test_refusals.py fuse/test_blocks.py"), aten("fuse/test_report.py"), *_FUSE),
    "fused_ops/_fuse/sites": (aten("fuse/test_blocks.py"), aten("fuse/test_matching.py"), *_FUSE),
    "fused_ops/_fuse/edit": (aten("fuse/test_blocks.py"), aten("fuse/test_report.py"), *_FUSE),
    "fused_ops/_fuse/rows": (aten("fuse/test_matching.py fuse/test_report.py"), *_FUSE),
    "fused_ops/_fuse/count": (aten("fuse/test_count.py fuse/test_count_clamps.py"),),
    "fused_ops/_fuse/norm_": (aten("fuse/test_norm_formula.py fuse/test_layer_norms.py"), aten("fuse/test_computed_parameters.py")),
    "export/": (aten("export/test_onnx.py export/test_onnx_names.py", "not minilm"), aten("export/test_cli.py")),
    "export/cli/": (aten("export/test_cli.py"), aten("export/test_quantize_choices.py")),
    "export/files/": (aten("export/test_files.py export/test_safety.py"), aten("export/test_engine.py")),
    "export/onnx/": (
        aten("export/test_onnx_precision.py export/test_onnx_names.py export/test_onnx_refusals.py"),
        aten("export/test_onnx.py export/test_onnx_ops.py", "not minilm"),
    ),
    "export/quantize/": (aten("export/test_quantize.py export/test_quantize_choices.py", "not minilm"),),
    "export/repository/": (aten("export/test_repository.py"),),
    "export/tensorrt/": (aten("export/test_timing_cache.py"), aten("export/test_tensorrt.py export/test_engine.py")),
    "export/verification/": (aten("export/test_verify.py"),),
    "export/torchscript": (aten("export/test_torchscript.py", "not minilm and not cpp"),),
    "export/aoti": (aten("export/test_aoti.py"),),
    "export/inspect": (aten("export/test_safety.py", "inspect"), aten("export/test_cli.py")),
}  # fmt: skip


# What a function is first tried with, by the first of these that its name holds: the few tests that run it above all.
_SOFTMAXES = {
    f"softmax_{pass_}_{kernel}": interpreted("rows_softmax", f"test_softmax_{test}[{variant}")
    for pass_, test in (("fwd", "forward"), ("bwd", "backward"))
    for kernel, variant in (("chunked", "chunked"), ("cluster", "cluster"), ("packed", "packed"), ("kernel", "tile"))
}
NEAREST: dict[str, Selection] = {
    **_SOFTMAXES,
    "layer_norm_fwd_chunked": interpreted("rows_layer_norm", "test_layer_norm[chunked"),
    "layer_norm_fwd_cluster": interpreted("rows_layer_norm", "clusters"),
    "layer_norm_fwd_kernel": interpreted("rows_layer_norm", "test_layer_norm[tile"),
    "norm_bwd_chunked": interpreted("rows_layer_norm", "test_layer_norm[chunked_tile or needed"),
    "layer_norm_bwd_kernel": interpreted("rows_layer_norm", "test_layer_norm[tile"),
    "rms_norm": interpreted("rows_rms_norm"),
    "gated_linear_fwd": interpreted("linear_variants", "gated"),
    "_store_gated": interpreted("linear_variants", "gated"),
    "gate_bwd": interpreted("many_rows", "gated"),
    "product_sum": interpreted("linear_variants", "gated"),
    "dact": interpreted("linear_variants", "test_mlp["),
    "linear_act_bwd": interpreted("many_rows", "linear"),
    "_store_fwd": interpreted("linear_variants", "test_linear[tma or fp8 or transposed"),
    "linear_fwd_tma": interpreted("linear_variants", "test_linear[tma or fp8 or transposed"),
    "linear_reduce": interpreted("linear_variants", "split_k"),
    "column_sum_kernel": interpreted("many_rows", "partial"),
    "activation": interpreted(
        "contract", f"{_SAMPLES}[linear-float32 and (relu or gelu or silu or sigmoid or tanh or quick_gelu)"
    ),
}


def runs_of(path: str, function: str) -> tuple[Selection, ...]:
    """The tests for a change in a function of a file; of an op's own file, those of its gradients."""
    if path.startswith("fused_ops/ops/") and not path.endswith(("_launch.py", "_plan.py")) and "/matmul" not in path:
        return _GRADIENTS
    broad = RUNS[max((start for start in RUNS if path.startswith(start)), key=len)]
    nearest = [tests for name, tests in NEAREST.items() if path.startswith("kernels/") and name in function]
    return (*nearest[:1], *broad)
