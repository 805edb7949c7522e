"""Orbax is quiet while a checkpoint is saved, and nothing else is."""

import logging
import sys

import pytest

from lowrank_jax import CheckpointError
from lowrank_jax.checkpoint import _quiet

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_what_others_log_meanwhile_is_logged(caplog):
    log = logging.getLogger("absl")

    def failed(text, error):
        try:
            raise error
        except ValueError:
            log.exception("_SignalingThread.run() raised an exception: %s", text)

    own, other = ValueError("own"), ValueError("other")
    hook = sys.unraisablehook
    with pytest.raises(CheckpointError), _quiet.silence_orbax("arrays-0a"):
        failed("at /x/arrays-0a/d", ValueError("of the same folder"))
        failed("no path", own)
        failed("no path", other)
        log.error("an error of the user's")
        log.info("_SignalingThread without an exception")
        raise CheckpointError("wrapped") from own
    assert [record.getMessage() for record in caplog.records] == [
        "an error of the user's",
        "_SignalingThread.run() raised an exception: no path",
    ]
    assert caplog.records[1].exc_info[1] is other
    assert not log.filters
    with _quiet.silence_orbax("arrays-0b"):
        pass
    assert sys.unraisablehook is hook
