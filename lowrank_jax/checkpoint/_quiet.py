"""Suppress what Orbax prints about an error that is raised anyway."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def silence_orbax(name: str) -> Iterator[None]:
    """Keep from standard error what Orbax logs about an error that the body raises.

    Orbax logs the tracebacks of its threads, and TensorStore prints one for each write that ends
    after its event loop. Records of others are not affected, even of other users of Orbax.

    Args:
      name: the unique name of the folder that Orbax writes or reads.
    """
    own, logger = _ErrorFilter(name), logging.getLogger("absl")
    logger.addFilter(own)
    try:
        with _ignore_closed_loops():
            yield
    except BaseException as error:
        own.raised = error
        raise
    finally:
        logger.removeFilter(own)
        own.release(logger)


class _ErrorFilter(logging.Filter):
    """A filter that holds back records of threads' exceptions until it is known whose they are."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder
        self.raised: BaseException | None = None
        self._held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged now."""
        if not record.exc_info or "_SignalingThread" not in record.getMessage():
            return True
        if self.folder not in record.getMessage():
            self._held.append(record)
        return False

    def release(self, logger: logging.Logger) -> None:
        """Log the held records, except those of the raised exception and its causes."""
        own = {id(error) for error in _iter_causes(self.raised)}
        for record in self._held:
            exception = record.exc_info[1] if record.exc_info else None
            if id(exception) not in own:
                logger.handle(record)
        self.raised, self._held = None, []  # the traceback's frames hold arrays, and this filter


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause's cause, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    yield from seen


class _UnraisableHook:
    """A sys.unraisablehook that drops the exceptions of callbacks to a closed event loop.

    TensorStore calls Orbax's event loop when a write ends, even if an error has closed the loop.
    """

    def __init__(self, before: Callable[[Any], object]):
        self.before = before

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        last = unraisable.exc_traceback
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        called = "" if last is None else last.tb_frame.f_code.co_name
        if unraisable.object is not None or called != "_check_closed":
            self.before(unraisable)


@contextlib.contextmanager
def _ignore_closed_loops() -> Iterator[None]:
    """Install an _UnraisableHook; it stays after an error, since writes may still be running."""
    global _users
    with _lock:
        _users += 1
        if not isinstance(sys.unraisablehook, _UnraisableHook):
            sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    failed = True
    try:
        yield
        failed = False
    finally:
        with _lock:
            _users -= 1
            if not failed and not _users and isinstance(sys.unraisablehook, _UnraisableHook):
                sys.unraisablehook = sys.unraisablehook.before
