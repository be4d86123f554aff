"""A fresh process of the process-policy cases: `python -m numa_vm.child ACTION [JSON of a Placement]`, told to end by its input.

It prints one JSON line when it is where it was asked to be, then waits. Without torch: starting takes two seconds in there.
"""

import contextlib
import json
import mmap
import subprocess
import sys
import threading

from ldft.memory.kernel_weights import kernel_weights, restore_kernel_weights
from ldft.memory.policy import Placement, process_policy, set_process_policy

PAGE = 4096
MAPPINGS: list[mmap.mmap] = []  # kept until the end


def take(mib: int) -> tuple[int, int]:
    """Anonymous memory as any library would take it; returns (address, bytes)."""
    import ctypes

    memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, len(memory), PAGE):
        memory[at] = 1
    MAPPINGS.append(memory)
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)
    sys.stdin.readline()


def policy(placement: Placement) -> None:
    """Takes memory under the policy in the main thread, in a thread started later, and in a process started later."""
    with kernel_weights(placement):
        set_process_policy(placement)
        ranges = [take(48)]
        thread = threading.Thread(target=lambda: ranges.append(take(24)))
        thread.start()
        thread.join()
        words = [sys.executable, "-m", "numa_vm.child", "inherit"]
        heir = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert heir.stdout
        inherited = json.loads(heir.stdout.readline())
        say(ranges=ranges, heir=heir.pid, **{f"heir_{name}": value for name, value in inherited.items()})
        heir.communicate("\n")


def plain(placement: Placement) -> None:
    set_process_policy(placement)
    say(ranges=[take(192)])


def mergeable(placement: Placement) -> None:
    """Base pages that khugepaged may merge: it is told that it may once they are there."""
    with kernel_weights(placement):
        set_process_policy(placement)
        taken = take(64)
        MAPPINGS[-1].madvise(mmap.MADV_HUGEPAGE)
        say(ranges=[taken])


def inherit(_: Placement) -> None:
    now = process_policy()
    say(ranges=[take(24)], policy=[now.kind, list(now.nodes), list(now.weights)])


def weights(placement: Placement) -> None:
    with kernel_weights(placement):
        say(holding=True)


def restore(_: Placement) -> None:
    say(restored=restore_kernel_weights())


def fail_inside(placement: Placement) -> None:
    with contextlib.suppress(KeyError), kernel_weights(placement):
        raise KeyError
    say(holding=False)


if __name__ == "__main__":
    given = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    action = {f.__name__: f for f in (policy, plain, mergeable, inherit, weights, restore, fail_inside)}[sys.argv[1]]
    try:
        action(Placement(**given))
    except (ValueError, MemoryError) as error:
        say(error=f"{type(error).__name__}: {error}")
