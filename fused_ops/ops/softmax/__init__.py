"""Softmax over any one dimension."""
