"""The objective: losses, balancing, targets, normalisation."""
