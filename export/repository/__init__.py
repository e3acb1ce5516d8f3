"""A model repository for an inference server."""
