"""A training run: step, checkpoint, folder, evaluation, memory, learning-rate schedule."""
