"""`python -m ldft.status [RESULTS_DIR]`: progress of a sweep (implemented in sweep/status.py)."""

from __future__ import annotations

import sys

from ldft.sweep.status import main

if __name__ == "__main__":
    sys.exit(main())
