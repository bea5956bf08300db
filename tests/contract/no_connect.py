"""Runs a command, and kills whatever of it or of its children connects to an address of the internet's protocols.

python no_connect.py COMMAND [ARGUMENT…]; a seccomp filter, for which nobody needs to be root.
"""

import ctypes
import os
import platform
import struct
import sys

CONNECT = {"x86_64": 42, "aarch64": 203}[platform.machine()]
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # prctl's
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of the kernel's packet filters
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, LENGTH = 0, 32  # where a filter finds the system call's number, and its third argument
LENGTHS = (16, 28)  # of IPv4's and IPv6's addresses; those of sockets in the file system are others


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid() -> None:
    """From now on, for this process and its children."""
    instructions = [
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 4, CONNECT),  # else four further
        (LOAD, 0, 0, LENGTH),
        (JUMP_IF_EQUAL, 1, 0, LENGTHS[0]),
        (JUMP_IF_EQUAL, 0, 1, LENGTHS[1]),
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


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
