"""Make the kernel reject system calls of a process, as file systems do that lack the operation."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Sequence

# The numbers of the calls, and the error of a file system without them.
_CALLS = {
    "x86_64": {"link": [86, 265], "renameat2": [316]},
    "aarch64": {"link": [37], "renameat2": [276]},
}
_ERRORS = {"link": errno.EPERM, "renameat2": errno.EINVAL}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse(names: Sequence[str]) -> None:
    """Make the kernel permanently reject the named calls of this process and its future threads."""
    if not names:
        return
    code = struct.pack("HBBI", _LOAD_WORD, 0, 0, 0)  # the number of the call
    for name in names:
        for number in _CALLS[platform.machine()][name]:
            code += struct.pack("HBBI", _JUMP_IF_EQUAL, 0, 1, number)
            code += struct.pack("HBBI", _RETURN, 0, 0, _ERRNO | _ERRORS[name])
    code += struct.pack("HBBI", _RETURN, 0, 0, _ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
