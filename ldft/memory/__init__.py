"""Host memory: where it is and where it should be."""
