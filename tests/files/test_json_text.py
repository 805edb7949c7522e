"""JSON of unknown origin: values as Python's own parser gives them, or one error."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.json_text import parse_json, read_file, read_json_object

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, st.booleans())
def test_a_value_comes_back(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 2}',
        b'[{"b": {"a": 1, "a": 1}}]',
        b'\xef\xbb\xbf{"a": 1}',  # a byte order mark
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xff"}',
        b'{"a": 1',
        b"",
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=["twice", "twice within", "mark", "utf-16", "not utf-8", "cut", "empty", "deep"],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError):
        parse_json(data)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match="larger than 4 bytes"):
        read_file(path, 4)
    with pytest.raises(CheckpointError, match="could not be read"):
        read_file(tmp_path / "missing", 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_file(tmp_path / "pipe", 4)


def test_only_an_object_is_an_object(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"a": [1]}')
    assert read_json_object(path, 100) == {"a": [1]}
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="list"):
        read_json_object(path, 100)
    path.write_text('{"a"')
    with pytest.raises(CheckpointError, match="file.*JSON"):
        read_json_object(path, 100)
