"""Run a command that the kernel refuses some system calls, as in a container.

    python tests/runner/refusing.py ERRNO CALL... -- COMMAND...

A seccomp filter, which all children inherit: what Docker's default profile does, without Docker.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# Numbers of the kernel (asm/unistd_64.h of x86, asm-generic/unistd.h of arm64), (architecture, number of each call).
CALLS = {
    "x86_64": (0xC000003E, {"move_pages": 279, "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239}),
    "aarch64": (0xC00000B7, {"move_pages": 239, "mbind": 235, "set_mempolicy": 237, "get_mempolicy": 236}),
}
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2


def refuse(code: int, calls: list[str]) -> None:
    """From now on this process and its children get `code` for these calls. Raises OSError where filters are not to be had."""
    architecture, numbers = CALLS[os.uname().machine]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for call in calls:
        program += [(_EQUAL, 0, 1, numbers[call]), (_RETURN, 0, 0, _ERRNO | code)]
    program.append((_RETURN, 0, 0, _ALLOW))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER_MODE, header)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    split = sys.argv.index("--")
    refuse(getattr(errno, sys.argv[1]), sys.argv[2:split])
    os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])
