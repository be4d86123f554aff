"""One run: checks, processes, status, row. The parent imports no torch."""
