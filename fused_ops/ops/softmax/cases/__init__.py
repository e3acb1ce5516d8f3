"""Samples, refused calls, error bounds, benchmark and audit cases of the family's ops."""
