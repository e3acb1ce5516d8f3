"""fused_ops inside PyTorch: compiled, transformed, distributed, explained, profiled."""
