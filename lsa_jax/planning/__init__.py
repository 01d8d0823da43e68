"""What a model will need on hardware that is not here: arithmetic, then compilation for it."""
