"""The mini model's own parts: its vocabulary and tokenizer."""
