"""What each family is tested, benchmarked and audited with: samples, errors, contract bounds, bench and audit cases."""

from . import gated_linear, layer_norm, layer_norm_fp8, linear, linear_fp8, mlp, softmax

__all__ = ["gated_linear", "layer_norm", "layer_norm_fp8", "linear", "linear_fp8", "mlp", "softmax"]
