"""Run a save in a background thread, and raise its error later."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  so that its hook is there before _finish_all
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from lowrank_jax._errors import CheckpointError
from lowrank_jax._jax.processes import raise_everywhere


class Saving:
    """A save that is running in a thread, returned by `checkpoint.save_async`.

    Its error is raised by `wait`, or by the next save to the same path, whichever comes first. At
    exit the program waits for it, and prints an error that has not been raised. With several
    processes the thread is that of process 0, and all of them call `wait`.

    Args:
      directory: where it writes.
      write: the function that writes the checkpoint; None in processes other than 0.

    >>> import tempfile
    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)))}
    >>> config = lowrank.LoraConfig()
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     saving = lowrank.checkpoint.save_async(directory, lora=lora, config=config)
    ...     saving.wait()
    >>> saving.done()
    True
    """

    def __init__(self, directory: os.PathLike, write: Callable[[], None] | None):
        self._directory = Path(directory).resolve()
        self._write: Callable[[], None] | None = write
        self._error: BaseException | None = None
        self._has_waited = False
        self._thread = threading.Thread(target=self._run, name=f"save to {directory}")
        self._thread.start()
        _pending[self._directory] = self

    def _run(self) -> None:
        try:
            if self._write is not None:
                self._write()
        except BaseException as error:
            self._error = error
        self._write = None  # it holds the arrays

    def done(self) -> bool:
        """Whether the save has ended, with or without an error.

        In processes other than 0 this is not known before `wait` has returned: it is False.
        """
        return self._has_waited if jax.process_index() else not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is complete on disk.

        Raises:
          CheckpointError: it could not be written; an older checkpoint is unchanged.
        """
        self.join()
        if not self._has_waited:
            self._has_waited = True
            try:
                raise_everywhere(self._error)
            except CheckpointError as error:
                self._error = error
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait for the thread of this process alone."""
        self._thread.join()
        if _pending.get(self._directory) is self:
            del _pending[self._directory]


_pending: dict[Path, Saving] = {}


def finish_pending_save(directory: Path) -> None:
    """Wait for an earlier save to this path, and raise its error."""
    saving = _pending.get(directory.resolve())
    if saving is not None:
        try:
            saving.wait()
        except CheckpointError as error:
            raise CheckpointError(
                f"an earlier save_async failed, and this save was not started: {error}"
            ) from error


def _finish_all() -> None:
    """Wait for all saves at exit, and print their errors."""
    for saving in list(_pending.values()):
        saving.join()  # not wait: other processes may have exited
        if saving._error is not None:
            traceback.print_exception(saving._error)


# Orbax runs each step of a save in an executor (asyncio.to_thread), and executors accept no work
# once concurrent.futures has noticed the program's exit. Python joins non-daemon threads and runs
# atexit functions only after that, and no public hook is called earlier. This private one of
# `threading` is: the last hook registered is the first called, before that of concurrent.futures.
# On a Python without it, exit leaves the older checkpoint complete, and prints the save's error.
getattr(threading, "_register_atexit", atexit.register)(_finish_all)
