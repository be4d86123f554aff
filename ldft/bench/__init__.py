"""`python -m ldft.bench`: measures this machine's memory bandwidths."""
