"""Model, data, DeepSpeed engine and the timed loop: the work of a rank."""
