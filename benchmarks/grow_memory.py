"""Touch host memory once and free it: some virtual machines get theirs page by page, slowly, at the first touch only.

python benchmarks/grow_memory.py GIB
"""

import mmap
import sys
import threading
import time

gib = int(sys.argv[1])
begin = time.time()
area = mmap.mmap(-1, gib << 30)
area.madvise(mmap.MADV_HUGEPAGE)


def touch(first: int) -> None:
    for offset in range(first << 30, (first + 1) << 30, 1 << 21):
        area[offset] = 1


threads = [threading.Thread(target=lambda n=n: [touch(i) for i in range(n, gib, 8)]) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
area.close()
print(f"grew {gib} GiB in {time.time() - begin:.0f} s", flush=True)
