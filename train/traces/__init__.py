"""Traces: the votes they hold, their format, and recording them."""
