"""Softmax kernels: one pass and chunked rows, packed 16-bit rows, clusters, inner dimensions."""
