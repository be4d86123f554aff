"""`python -m ldft.plan`: the best plan for a model on a machine (implemented in cli/plan_command.py)."""

from __future__ import annotations

import sys

from ldft.cli.plan_command import main

if __name__ == "__main__":
    sys.exit(main())
