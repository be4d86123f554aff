"""Gradient checkpointing, with layer inputs and attention outputs on the device or in host memory."""
