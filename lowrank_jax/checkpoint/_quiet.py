"""Silence for what Orbax prints of an error that is raised anyway."""

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
    """Keep from standard error what Orbax logs of an error that comes out of the body.

    Orbax logs the tracebacks of its threads, and TensorStore prints one for each write that ends
    after its event loop. What others log, other users of Orbax among them, is printed as ever.

    Args:
      name: that of the folder that Orbax writes; no other folder is called so.
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
    """Holds records of exceptions in threads back, until it is known whose they are."""

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder
        self.raised: BaseException | None = None
        self._held: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is to be logged now."""
        if not record.exc_info or "_SignalingThread" not in record.getMessage():
            return True
        if self.folder not in record.getMessage():
            self._held.append(record)
        return False

    def release(self, logger: logging.Logger) -> None:
        """Log those held that are not of what was raised."""
        own = {id(error) for error in _iter_causes(self.raised)}
        for record in self._held:
            exception = record.exc_info[1] if record.exc_info else None
            if id(exception) not in own:
                logger.handle(record)
        self.raised, self._held = None, []  # its frames hold arrays, and this filter


def _iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came of."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    yield from seen


class _UnraisableHook:
    """A hook of exceptions that nobody can catch, less those of callbacks to a closed event loop.

    TensorStore calls the loop of Orbax for each write that ends, after an error too.
    """

    def __init__(self, before: Callable[[Any], object]):
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        last = unraisable.exc_traceback
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        called = "" if last is None else last.tb_frame.f_code.co_name
        if unraisable.object is not None or called != "_check_closed":
            self.before(unraisable)


@contextlib.contextmanager
def _ignore_closed_loops() -> Iterator[None]:
    """Have a _UnraisableHook in place; after an error it stays, for writes may still be under way."""
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
