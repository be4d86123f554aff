"""Chooses how a run uses the machine's memories: the time of an iteration by formula, the plans that fit, and the best of them."""
