"""`python -m ldft`."""

import sys

from ldft.cli import main

sys.exit(main())
