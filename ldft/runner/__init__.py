"""Runs one config: checks, processes, status, row. The parent imports no torch."""
