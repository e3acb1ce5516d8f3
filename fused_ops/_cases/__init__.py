"""What each family is tested, benchmarked and audited with: samples, errors, contract bounds, bench and audit cases."""

from . import layer_norm, linear, softmax

__all__ = ["layer_norm", "linear", "softmax"]
