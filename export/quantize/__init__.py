"""INT8 and FP8 quantisation of an ONNX file, with calibration."""
