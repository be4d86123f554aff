"""Attention that transformers does not bring along, a file a kernel."""
