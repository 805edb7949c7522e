"""JSON that anyone may have sent: read within a limit of bytes, as UTF-8, each key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank_jax._errors import CheckpointError


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is not UTF-8 without a byte order mark, is not JSON, has a key twice in one
        object, or is nested too deeply.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_reject_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of a folder.

    Raises:
      CheckpointError: it cannot be read, or has more bytes than the limit.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe, say, which would be waited for
            raise CheckpointError(f"{path} could not be read (it is not a regular file)")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} could not be read ({error!r})") from error
    if len(data) > limit:
        raise CheckpointError(
            f"{path} has more than {limit} bytes, too many for a file of its kind"
        )
    return data


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object that a file of a folder holds.

    Raises:
      CheckpointError: the file cannot be read, is not JSON, or holds another value.
    """
    try:
        value = parse_json(read_file(path, limit))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} could not be read: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object")
    return value


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
