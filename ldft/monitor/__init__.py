"""What memory and devices do while runs work: live in a terminal, and sampled into a run's trace."""
