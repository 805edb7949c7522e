"""Damaged archives: flipped bytes, missing files, forged manifests; nothing is unpickled."""

import os
import pickle
import re
import time

import numpy as np
import pytest
from checkpoints import edit, entries

from lowrank_jax import CheckpointError, checkpoint

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_every_flipped_byte_is_caught(copy):
    generator = np.random.default_rng(0)
    for name, content in entries(copy).items():
        for _ in range(8):
            at, bit = generator.integers(len(content)), 1 << generator.integers(8)
            flipped = bytearray(content)
            flipped[at] ^= bit
            (copy / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"damaged|not a manifest|format version"):
                checkpoint.restore(copy)
        (copy / name).write_bytes(content)
    assert checkpoint.restore(copy).step == 1


def test_missing_and_truncated_files(copy):
    folder = next(copy.glob("arrays-*"))
    contents = entries(folder)
    for name, content in contents.items():  # one by one: the message lists the first few of many
        (folder / name).write_bytes(content[:-1])
        words = f"{name}: {len(content) - 1} bytes, expected {len(content)}"
        with pytest.raises(CheckpointError, match=f"damaged(?s:.*){re.escape(words)}"):
            checkpoint.restore(copy)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=re.escape(f"{name}: missing")):
            checkpoint.restore(copy)
        (folder / name).write_bytes(content)
    for name in contents:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="_METADATA: missing"):
        checkpoint.restore(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json"):
        checkpoint.restore(copy)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.restore(copy / "nowhere")


def test_a_leaf_is_verified_beyond_its_file(copy):
    def swap(body):
        one, other = "lora/params/Dense_0/kernel/a", "opt_state/0/mu/params/Dense_0/kernel/a"
        body["arrays"][one], body["arrays"][other] = body["arrays"][other], body["arrays"][one]

    edit(copy, swap)
    with pytest.raises(CheckpointError, match="lora/params/Dense_0/kernel/a: its SHA-256"):
        checkpoint.restore(copy)


def test_unknown_version_is_refused(copy):
    edit(copy, lambda body: body.update(version=3))
    with pytest.raises(
        CheckpointError, match=r"format version 3; this lowrank_jax reads versions 1 and 2"
    ):
        checkpoint.restore(copy)


def nothing(path, value):
    """A change of a manifest at a path of keys."""

    def change(body):
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


FORGED = {
    "no folder": nothing(["folder"], None),
    "folder outside": nothing(["folder"], "../arrays-" + 32 * "0"),
    "file outside": nothing(["files", "../../x"], [3, "0"]),
    "absolute file": nothing(["files", "/etc/passwd"], [3, "0"]),
    "huge array": nothing(["arrays", "lora/params/Dense_0/kernel/a", 0], [1 << 40, 1 << 20]),
    "negative size": nothing(["arrays", "lora/params/Dense_0/kernel/a", 0], [-3, -2]),
    "unknown dtype": nothing(["arrays", "lora/params/Dense_0/kernel/a", 1], "object"),
    "config key": nothing(["config", "shape"], 3),
    "config regex": nothing(["config", "targets"], [{"re": "("}]),
    "config type": nothing(["config"], []),
    "node type": nothing(["lora", 0, "type"], "os.system"),
    "node axes": nothing(["lora", 1, "static", "fan_in"], [7]),
    "node scale": nothing(["lora", 1, "static", "scale"], "x"),
    "array name": nothing(["lora", 1, "arrays", "a", "name"], "elsewhere"),
    "array form": nothing(["opt_state", 0, "form"], "pickle"),
    "step": nothing(["step"], "x"),
    "base": nothing(["base"], {"algorithm": "md5", "leaves": {}}),
    "list": nothing(["opt_state"], 3),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests_give_one_typed_error(copy, name):
    edit(copy, FORGED[name])
    began = time.perf_counter()
    with pytest.raises(CheckpointError):
        checkpoint.restore(copy)
    assert time.perf_counter() - began < 2


def test_text_that_is_no_manifest(copy):
    for text in ("", "[]", "{", "[" * 100_000, "3", '{"format": "other"}', "\0", "NaN"):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.restore(copy)


def test_nothing_is_unpickled(copy, tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    payload = pickle.dumps(Payload())
    for name in entries(copy):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(payload)
        with pytest.raises(CheckpointError):
            checkpoint.restore(copy)
        (copy / name).write_bytes(content)
    assert not (tmp_path / "ran").exists()
