"""Freed memory stays with the process."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Have glibc's malloc keep what is freed, for the next step to use: a step frees and takes the same sizes again.

    By default large blocks go back to the kernel, which clears and maps their pages anew at every step, for up to a
    fifth of the time of a CPU step. Elsewhere than on Linux with glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)
