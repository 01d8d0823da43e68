"""The backbone itself, trained from scratch: sequences, losses, a step."""
