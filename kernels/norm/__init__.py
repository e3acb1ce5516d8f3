"""Layer norm kernels: forward, backward, clusters, output quantised to fp8."""
