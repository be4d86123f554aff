"""DeepSpeed in the process of these tests runs on the GPU, where there is one."""

import os

from ldft import environment

if environment.gpus():
    os.environ["DS_ACCELERATOR"] = "cuda"
