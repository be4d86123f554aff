"""In the guest: a command on a machine that has been measured, by a profile that this writes: `measured.py COMMAND...`.

Nothing is timed in an emulated machine; the rates are those of two sockets and two CXL expanders.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

DEVICE = {
    "products_tflops_per_s": 0.1,
    "attention_tflops_per_s": {"64": {"512": [0.1, 0.1]}},
    "memory_gb_per_s": 10.0,
    "peer_gb_per_s": None,
    "launches_beside": 1.0,
}
PROFILE = {
    "bandwidth": {f"node{node}": {"cpu": rate} for node, rate in enumerate((100, 100, 30, 30))},
    "devices": {f"cpu {precision}": DEVICE for precision in ("bf16", "fp32")},
}

if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    path = folder / "ldft" / "hardware" / f"{socket.gethostname()}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(PROFILE))
    os.environ["XDG_CONFIG_HOME"] = str(folder)
    os.execvp(sys.argv[1], sys.argv[1:])
