"""The code that knows DeepSpeed from inside: names here may change with a release of it."""
