"""Model, data, DeepSpeed engine and the timed loop: what a worker does."""
