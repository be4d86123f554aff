"""Code that depends on DeepSpeed's internals, whose names may change in any release."""
