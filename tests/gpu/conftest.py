"""DeepSpeed in the process of these tests runs on the GPU, where there is one. Runs find no measured rates: none is planned."""

import os
import tempfile

from ldft import environment

if environment.gpus():
    os.environ["DS_ACCELERATOR"] = "cuda"
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp()
