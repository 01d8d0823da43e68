"""Accuracy by arm and budget: one prefill of a haystack, answers of every arm from forks of it."""
