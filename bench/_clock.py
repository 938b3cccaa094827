"""A timer for loads: uvloop's own has steps of a millisecond, in which half a millisecond of a gateway would vanish.

Two processes whose timers have the same steps are worse: an upstream that waits "50 ms" answers at the next step
whether it was asked early or late in this one, and what the gateway took is never seen. So times are kept by Linux's
timerfd, which is exact to some tens of microseconds, on the clock of `time.monotonic`, one for the whole machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import os
import time
from collections.abc import Callable
from typing import Any

_MONOTONIC, _NONBLOCK, _CLOEXEC, _ABSOLUTE = 1, 0o4000, 0o2000000, 1


class _Times(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("every_seconds", ctypes.c_long),
        ("every_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Clock:
    """Calls back at times of `time.monotonic`, in the running loop."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._ring)

    def at(self, due: float, call: Callable[..., object], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._due, (due, self._count, call, args))
        if self._due[0][1] == self._count:
            self._set(due)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _set(self, due: float) -> None:
        """One that is past rings at once."""
        seconds = int(due)
        times = _Times(0, 0, seconds, max(1, int((due - seconds) * 1e9)))
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(times), None)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, call, args = heapq.heappop(self._due)
            call(*args)
        if self._due:
            self._set(self._due[0][0])
