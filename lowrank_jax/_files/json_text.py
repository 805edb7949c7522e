"""Parse untrusted JSON: limited in size, strictly UTF-8, without duplicate keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank_jax._errors import CheckpointError


def parse_json(data: bytes) -> Any:
    """Parse a JSON text.

    Raises:
      ValueError: the text is not JSON, is not UTF-8 without a byte order mark, repeats a key in an
        object, or is nested too deeply.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_reject_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_file(path: Path, limit: int) -> bytes:
    """Read a regular file.

    Raises:
      CheckpointError: the file cannot be read, or is larger than `limit` bytes.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise CheckpointError(f"{path} could not be read (it is not a regular file)")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} could not be read ({error!r})") from error
    if len(data) > limit:
        raise CheckpointError(
            f"{path} is larger than {limit} bytes, the limit for a file of this kind"
        )
    return data


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
      CheckpointError: the file cannot be read, is not JSON, or holds a value of another type.
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
    """Build a dict from a JSON object's pairs; ValueError if a key is repeated."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated in an object")
    return found
