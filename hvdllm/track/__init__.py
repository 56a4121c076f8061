"""Trackers, which get a run's records too: Weights & Biases, TensorBoard. They never stop or slow a run."""
