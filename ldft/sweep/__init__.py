"""Many cells: planning them, deciding about each, running and showing them."""
