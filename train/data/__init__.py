"""From traces to batches of training samples."""
