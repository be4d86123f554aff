"""`python -m ldft.model FOLDER_OR_ID`: a model option from a Hugging Face config.json (implemented in training/model_option.py)."""

from __future__ import annotations

import sys

from ldft.training.model_option import main

if __name__ == "__main__":
    sys.exit(main())
