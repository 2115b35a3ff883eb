"""Train, compare and evaluate networks with and without sharpness-aware optimizers."""
