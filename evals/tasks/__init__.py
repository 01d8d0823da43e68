"""Synthetic long-context tasks in the mini vocabulary: training rows and test examples."""
