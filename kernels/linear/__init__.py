"""Matmul kernels with an epilogue: linear, gated linear, their backwards, split K, TMA."""
