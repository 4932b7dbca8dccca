"""SIGINT and SIGTERM, polled: the run stops at a place where nothing is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from fasttune.errors import Stopped


class Signals:
    """While entered, a first SIGINT or SIGTERM is only noted; a second one acts as it would without us."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._previous.get(signum, signal.SIG_DFL))

    def poll(self, doing: str) -> None:
        """Raises Stopped if a signal has come."""
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Stopped(self.received, f"stopped by {name} while {doing}")
