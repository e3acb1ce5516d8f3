"""`make demo`: all-MiniLM-L6-v2 fused, run through the kernels, trained, compiled and exported, each step held to a bound.

`python -m bench.demo` from the repository's root. Results under build/demo/: the ONNX file, the engine, the TorchScript
file and report.json. Exit status 1 when a row misses its bound.
"""
