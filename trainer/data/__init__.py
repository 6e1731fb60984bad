"""Training data: crops, batches, loader, sampler, levels, schedule, selection."""
