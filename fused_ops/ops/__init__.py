"""The fused ops, a folder a family.

Of each op: `<op>.py` holds the public function and its SPEC, `<op>_reference.py` the same computed by ATen, `<op>_launch.py`
the launches of its kernels, `<op>_onnx.py` its ONNX operators where it has them, `cases/<op>.py` what it is
tested, benchmarked and audited with.
"""
