"""A machine that executes compiled kernels, PTX, on a CPU, and refuses what a GPU would get wrong. README.md says what it models."""
