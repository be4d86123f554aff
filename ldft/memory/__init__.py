"""Host memory: what the machine has (topology, limits), where to put things (policy, strategies), doing it (allocator, arenas), and
looking (probe, audit).

Only `roles` knows where DeepSpeed keeps its tensors; `estimate`, `vram` and `strategies` read the settings that it is given
(`training.deepspeed_config`, which imports neither). Having tensors allocated in arenas, and moving them there, is `training`'s.
`roles`, `audit`, `allocator` and `arenas` import torch; the rest does without. Nothing here knows of Hydra.
"""
