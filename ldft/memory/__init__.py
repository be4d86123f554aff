"""Host memory: what the machine has (topology, limits), where tensors go (policy, layout, cost_model), allocating them (placing,
allocator, arenas), and checking the result (probe, drift).

From the rest of ldft these modules import only the errors and the native code. `allocator` and `arenas` import torch, the others do
not. Nothing here depends on Hydra or DeepSpeed: `training` allocates DeepSpeed's tensors in the arenas.
"""
