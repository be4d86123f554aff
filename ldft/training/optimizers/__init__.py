"""ldft's own optimizers."""
