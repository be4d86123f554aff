"""Everything decided about a run before a rank starts. Nothing here imports torch."""
