"""A training run: objectives, the step, the loop, checkpoints."""
