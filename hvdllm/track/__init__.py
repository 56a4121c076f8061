"""Who else gets a run's records: Weights & Biases, TensorBoard. Never stops or slows a run."""
