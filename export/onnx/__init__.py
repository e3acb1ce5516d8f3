"""ONNX export: the exporter, names in the graph, lower precision, and a translation table for torch.onnx.export."""
