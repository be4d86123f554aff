"""Measure where long-context fine-tuning with ZeRO-Offload should put its bytes. Importing this imports nothing else."""
