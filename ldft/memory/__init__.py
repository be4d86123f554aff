"""Host memory: what the machine has (topology, limits), where to put things (policy), doing it (allocator), and looking
(probe).

Only `allocator` imports torch. Nothing here knows of Hydra or DeepSpeed.
"""
