"""Host memory: what the machine has (topology, limits), where to put things (policy, strategies), doing it (allocator, arenas), and
looking (probe, audit).

Only `roles`, `construction`, `rebinding` and `audit` know of DeepSpeed: which its tensors are, having them allocated in arenas,
moving them there, checking. They and `allocator` and `arenas` import torch; the rest does without. Nothing here knows of Hydra.
"""
