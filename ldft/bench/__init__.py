"""`python -m ldft.bench`: what this machine can do."""
