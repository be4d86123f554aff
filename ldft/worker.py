"""`python -m ldft.worker ATTEMPT_DIR`: one rank, started by the parent (implemented in runner/worker.py)."""

from __future__ import annotations

import sys

from ldft.runner.worker import main

if __name__ == "__main__":
    sys.exit(main())
