"""Training: state, optimizer, batches, objectives, the update step, checkpoints."""
