"""`python -m ldft.monitor`: memory by NUMA node and the runs that use it, live."""

from __future__ import annotations

import sys

from ldft.monitor.live import main

if __name__ == "__main__":
    sys.exit(main())
