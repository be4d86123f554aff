"""Random input: whatever a user types or has on disk, the answer is one line or a result, never an internal error.

LDFT_FUZZ_EXAMPLES=2000 LDFT_FUZZ_SEED=random .venv/bin/python -m pytest -n 2 tests/fuzz       a long search, each time another
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

from tests.conftest import IN_CI

# By default a short search that is the same each time: a test must not fail by chance.
settings.register_profile(
    "ldft",
    max_examples=int(os.environ.get("LDFT_FUZZ_EXAMPLES", "25" if IN_CI else "8")),
    derandomize=os.environ.get("LDFT_FUZZ_SEED") != "random",
    database=None,
    deadline=None,
    # A failing example is short enough to read; shrinking it would take minutes.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("ldft")
