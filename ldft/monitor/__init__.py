"""Observes memory and devices during runs: live in a terminal, and as samples in a run's trace."""
