"""With this folder on PYTHONPATH, Cog's worker, or what it starts, is killed when it opens a socket of the internet.

By a seccomp filter, for which nobody needs to be root. Cog's server process, which has to listen, is not watched.
"""

import ctypes
import platform
import socket
import struct
import sys

SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # prctl's
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of the kernel's packet filters
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, FAMILY = 0, 16  # where a filter finds the system call's number, and its first argument


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid() -> None:
    """From now on, for this process and its children."""
    instructions = [
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 4, SOCKET),  # else four further
        (LOAD, 0, 0, FAMILY),
        (JUMP_IF_EQUAL, 1, 0, socket.AF_INET),
        (JUMP_IF_EQUAL, 0, 1, socket.AF_INET6),
        (RETURN, 0, 0, KILL),
        (RETURN, 0, 0, ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (SET_SECCOMP, FILTER, ctypes.byref(Program(len(instructions), code)), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "this kernel takes no filter")


if "_run_worker" in sys.orig_argv[-1]:
    import urllib3  # noqa: F401  it opens one when it is imported, to see whether this machine has IPv6

    forbid()
