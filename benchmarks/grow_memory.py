"""Touch host memory once and free it: some virtual machines receive memory slowly, page by page, at the first touch only.

python benchmarks/grow_memory.py GIB
"""

import mmap
import sys
import threading
import time

gib = int(sys.argv[1])
begin = time.time()
area = mmap.mmap(-1, gib << 30)


def touch(number: int) -> None:
    for block in range(number, gib, 8):
        area.madvise(23, block << 30, 1 << 30)  # MADV_POPULATE_WRITE


threads = [threading.Thread(target=touch, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
area.close()
print(f"grew {gib} GiB in {time.time() - begin:.0f} s", flush=True)
