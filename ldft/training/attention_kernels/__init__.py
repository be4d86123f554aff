"""Attention kernels that transformers does not include, one file per kernel."""
