"""Trains a memory indexer from traces of a backbone: recorded or imported, never the backbone."""
