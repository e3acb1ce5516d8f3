"""TensorRT and TensorRT for RTX: building an engine, and running one."""
