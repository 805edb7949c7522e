"""The two files of an adapter on disk: killed saves, links, and bytes that anyone may have sent."""

import json
import os
import random
import string
import struct
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import HEADER_LIMIT, TensorFile, write_tensors
from lowrank_jax.peft import _folder
from lowrank_jax.peft._config import DEFAULTS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PARAMS = {"q": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}


def adapter(value, rank=2):
    node = lowrank.LowRank(jnp.full((4, rank), value), jnp.full((rank, 3), value), scale=1.5)
    return {"q": {"kernel": node, "bias": None}, "norm": {"scale": lowrank.Full(jnp.ones(3))}}


def save(directory, value=1.0, rank=2):
    lowrank.peft.save(directory, adapter(value, rank), lowrank.LoraConfig())


def load(directory):
    return lowrank.peft.load(directory, PARAMS)[1]


def refused(directory, said):
    with pytest.raises(CheckpointError) as error:
        load(directory)
    assert said in " ".join(str(error.value).split())


# Killed saves


class Killed(BaseException):
    """What no handler of errors catches."""


CALLS = ("replace", "fsync", "open", "link")


@pytest.mark.parametrize("rank", [2, 3], ids=["the same configuration", "another"])
def test_a_killed_save_leaves_one_adapter_or_none(rank, tmp_path, monkeypatch):
    seen = set()
    for at in range(100):
        directory = tmp_path / str(at)
        save(directory, 1.0)
        (directory / "README.md").write_text("kept")
        count = iter(range(10**6))

        def dying(real, count=count, at=at):
            def call(*args, **kwargs):
                if next(count) >= at:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                save(directory, 2.0, rank)
            except Killed:
                killed = True
            else:
                killed = False
        assert (directory / "README.md").read_text() == "kept"
        try:
            found = load(directory)
        except CheckpointError as error:
            assert "holds no adapter_config.json" in str(error)  # noqa: PT017
            seen.add("none")
        else:
            old = found["q"]["kernel"].a[0, 0] == 1
            wanted = adapter(1.0) if old else adapter(2.0, rank)
            chex.assert_trees_all_equal(found, wanted)
            seen.add("old" if old else "new")
        save(directory, 3.0)  # a later save is not hindered, and clears what was left
        assert {path.name for path in directory.iterdir()} == {"README.md", CONFIG, TENSORS}
        if not killed:
            break
    assert at > 8
    assert seen == ({"old", "new"} if rank == 2 else {"old", "new", "none"})


def test_a_save_that_comes_between_is_noticed(tmp_path, monkeypatch):
    save(tmp_path, 1.0)

    def late(folder):
        save(tmp_path, 2.0, rank=3)
        return _folder.find_tensors(folder)

    monkeypatch.setattr(lowrank.peft._load, "find_tensors", late)
    refused(tmp_path, "was saved again while it was read: load it again")
    monkeypatch.undo()
    chex.assert_trees_all_equal(load(tmp_path), adapter(2.0, 3))


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    save(tmp_path, 1.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_folder, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2.0)
    chex.assert_trees_all_equal(load(tmp_path), adapter(1.0))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, TENSORS}


def test_files_are_as_readable_as_others(tmp_path):
    save(tmp_path)
    (tmp_path / "plain").touch()
    mode = lambda name: (tmp_path / name).stat().st_mode
    assert mode(CONFIG) == mode(TENSORS) == mode("plain")


# Links and other files


def test_a_save_does_not_follow_links(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    (tmp_path / "adapter").mkdir()
    for name in (CONFIG, TENSORS):
        (tmp_path / "adapter" / name).symlink_to(outside)
    save(tmp_path / "adapter")
    assert outside.read_text() == "untouched"
    chex.assert_trees_all_equal(load(tmp_path / "adapter"), adapter(1.0))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_link_out_of_the_directory_is_refused(name, tmp_path):
    save(tmp_path / "adapter")
    (tmp_path / "adapter" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "adapter" / name).symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "adapter", "is a link out of its directory")


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    save(snapshot)
    blobs.mkdir()
    for name in (CONFIG, TENSORS):
        (snapshot / name).rename(blobs / name[-5:])
        (snapshot / name).symlink_to(Path("../../blobs") / name[-5:])
    chex.assert_trees_all_equal(load(snapshot), adapter(1.0))


def test_pickles_pipes_and_what_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "holds no adapter_config.json")
    save(tmp_path)
    (tmp_path / TENSORS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path, "adapter_model.bin is a pickle, which is not read for safety")
    os.mkfifo(tmp_path / TENSORS)
    refused(tmp_path, "is not a regular file")


# Files of tensors

HEADERS = {
    "nothing": (b"", "too few or too many"),
    "a long header": (struct.pack("<Q", 1 << 60) + b"{}", "too few or too many"),
    "no JSON": (b"{'a': 1}", "is not JSON"),
    "deep JSON": (b"[" * 200_000, "is not JSON"),
    "a list": (b"[]", "is not a JSON object"),
    "a key twice": (b'{"a":1,"a":1}', "a key is repeated"),
    "no entry": (b'{"a":{"dtype":"F32"}}', "its header has"),
    "a dtype": (b'{"a":{"dtype":"F7","shape":[],"data_offsets":[0,0]}}', "of dtype 'F7'"),
    "a listed dtype": (b'{"a":{"dtype":["F32"],"shape":[],"data_offsets":[0,4]}}', "of dtype"),
    "a negative size": (
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        "natural numbers",
    ),
    "a huge size": (
        b'{"a":{"dtype":"F32","shape":[4611686018427387903],"data_offsets":[0,4]}}',
        "does not match its shape",
    ),
    "many huge sizes": (
        b'{"a":{"dtype":"F32","shape":[4611686018427387903,4611686018427387903],'
        b'"data_offsets":[0,4]}}',
        "does not match its shape",
    ),
    "more than there is": (
        b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}',
        "its header says 4000000000",
    ),
    "a hole": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', "a gap or an overlap"),
    "an overlap": (
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        "a gap or an overlap",
    ),
    "true for one": (
        b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}',
        "natural numbers",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case, tmp_path):
    save(tmp_path)
    header, said = HEADERS[case]
    if case not in ("nothing", "a long header"):
        header = struct.pack("<Q", len(header)) + header
    (tmp_path / TENSORS).write_bytes(header)
    refused(tmp_path, said)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    save(tmp_path)
    with (tmp_path / TENSORS).open("wb") as file:  # sparse: a petabyte of nothing
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(1 << 40)
    refused(tmp_path, "too few or too many")
    with (tmp_path / CONFIG).open("wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path, "has 1099511627776 bytes")


def test_every_dtype_and_shape_is_read_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype}{shape}": (100 * rng.standard_normal(shape)).astype(dtype)
        for dtype in ("float64", "float32", "float16", jnp.bfloat16, "int64", "int8", "uint8", bool)
        for shape in ((), (0, 3), (5,), (2, 3, 1))
    }
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, tensors)
    with TensorFile(tmp_path / "file") as file:
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = file.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.tobytes() == tensor.tobytes()
            assert found.flags.writeable


@pytest.mark.parametrize("shape", [(3, 1000), (1000, 3), (300, 600), (600, 300), (1, 5), (0, 3)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def test_transposes_are_written_in_blocks(shape, dtype, tmp_path):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, {"turned": values.T, "half": values.T[::2]})
    with TensorFile(tmp_path / "file") as file:
        assert file.read("turned").tobytes() == values.T.tobytes()
        assert file.read("half").tobytes() == values.T[::2].tobytes()


def test_saving_copies_one_tensor_at_a_time(tmp_path):
    node = lambda: lowrank.LowRank(jnp.ones((4096, 16)), jnp.ones((16, 4096)))
    lora = {f"q_{i}": {"kernel": node()} for i in range(32)}
    tracemalloc.start()
    lowrank.peft.save(tmp_path, lora, lowrank.LoraConfig(rank=16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lora))
    assert peak < size / 4, f"{peak} bytes for an adapter of {size}"


# Bytes that anyone may have sent

LITERALS = [None, True, False, -1, 0, 1, 3, 10**400, 1e308, float("nan"), float("inf"), "", "x"]
LITERALS += ["LORA", "all-linear", [], {}, ["q"], [[1]], {"q": 2}, {"(": 1}, {"(q*)*": 2}, [10**30]]


def flipped(data, chance):
    """The bytes with some changed, cut away, or doubled."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 4))):
        at, end = sorted(chance.choices(range(len(data) + 1), k=2))
        match chance.randrange(5):
            case 0 if at < len(data):
                data[at] = chance.randrange(256)
            case 1:
                del data[at : min(end, at + chance.randint(1, 64))]
            case 2:
                data[at:at] = data[at : at + 16]
            case 3:
                del data[at:]
            case 4 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def survives(directory):
    """Whether an adapter was read; anything but it or a CheckpointError is raised."""
    try:
        _, lora, _ = lowrank.peft.load(directory, PARAMS)
    except CheckpointError as error:
        assert len(str(error)) < 20_000  # noqa: PT017
        return False
    assert lora["q"]["kernel"] is None or lora["q"]["kernel"].shape == (4, 3)
    return True


def fuzz_tensors(directory, count):
    save(directory)
    whole = (directory / TENSORS).read_bytes()
    chance, read = random.Random(0), 0
    for _ in range(count):
        (directory / TENSORS).write_bytes(flipped(whole, chance))
        read += survives(directory)
    return read


def fuzz_configs(directory, count):
    save(directory)
    text = (directory / CONFIG).read_bytes()
    config, chance, read = json.loads(text), random.Random(1), 0
    for _ in range(count):
        if chance.random() < 0.3:
            (directory / CONFIG).write_bytes(flipped(text, chance))
        else:
            changed = dict(config)
            for _ in range(chance.randint(1, 3)):
                field = chance.choice([*DEFAULTS, "".join(chance.choices(string.printable, k=5))])
                changed[field] = chance.choice(LITERALS)
                if chance.random() < 0.1:
                    del changed[field]
            (directory / CONFIG).write_text(json.dumps(changed))
        read += survives(directory)
    return read


def test_no_bytes_of_tensors_do_harm(tmp_path):
    assert 3 < fuzz_tensors(tmp_path, 300) < 290


def test_no_configuration_does_harm(tmp_path):
    assert 10 < fuzz_configs(tmp_path, 300) < 290


@pytest.mark.slow
def test_no_bytes_of_many_tensors_do_harm(tmp_path):
    assert 200 < fuzz_tensors(tmp_path, 20_000) < 19_000


@pytest.mark.slow
def test_no_configurations_of_many_do_harm(tmp_path):
    assert 300 < fuzz_configs(tmp_path, 10_000) < 9_700


# Values that are not numbers


def everything():
    """Parameters and an adapter of every kind of tensor that a file may hold."""
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "q": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3)},
    }
    rows = lowrank.Rows(
        b=jnp.ones((2, 4)), fan_in=(0,), fan_out=(1,), kind="lookup", rows=(1, 3), size=5
    )
    factors = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones(3))
    lora = {
        "embed": {"embedding": rows},
        "q": {"kernel": factors, "bias": lowrank.Full(jnp.ones(3))},
        "norm": {"scale": lowrank.Full(jnp.ones(3))},
    }
    return params, lora


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_every_tensor_that_is_not_finite_is_named(value, tmp_path):
    """Factors, magnitudes, biases, modules saved whole, and rows of tables."""
    params, lora = everything()
    lowrank.peft.save(tmp_path, lora, lowrank.LoraConfig(), base=params)
    with TensorFile(tmp_path / TENSORS) as file:
        tensors = {key: np.array(file.read(key)) for key in file.entries}
    assert len(tensors) == len(jax.tree.leaves(lora)) == 6

    def load(bad):
        found = {key: tensor.copy() for key, tensor in tensors.items()}
        for key in bad:
            found[key].reshape(-1)[-1] = value
        with (tmp_path / TENSORS).open("wb") as stream:
            write_tensors(stream, found)
        return lowrank.peft.load(tmp_path, params)

    load([])
    for bad in (*([key] for key in tensors), [*tensors]):
        with pytest.raises(CheckpointError, match="holds NaN or infinity") as error:
            load(bad)
        assert str(error.value).splitlines()[1:] == [f"  - {key}" for key in sorted(bad)]
