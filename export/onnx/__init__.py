"""ONNX: the export itself, its graph passes, lower precision, the translation table."""
