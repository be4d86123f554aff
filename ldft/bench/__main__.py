"""`python -m ldft.bench nodes`: bandwidths by NUMA node."""

from __future__ import annotations

import sys

from ldft.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
