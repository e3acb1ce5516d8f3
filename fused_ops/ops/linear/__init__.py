"""Linears with what follows them: bias and activation, a gate, a second linear, fp8 operands."""
