"""Lookahead Sparse Attention: which pages are on the device, and how they get there."""
