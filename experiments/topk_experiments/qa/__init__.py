"""Question answering with full and with top-k models: evaluation, fine-tuning, and a table of both."""
