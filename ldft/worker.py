"""`python -m ldft.worker ATTEMPT_DIR`: one rank, started by the parent (implemented in runner/worker.py)."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys

from ldft.runner.worker import main

if __name__ == "__main__":
    code = main()
    # Python would look for garbage and then free a million objects one by one, which takes a second; the kernel frees them at once.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)  # what native libraries have printed
    os._exit(code)
