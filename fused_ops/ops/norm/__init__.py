"""Norms: layer norm, and layer norm with its output quantised to fp8."""
