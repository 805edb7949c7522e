"""The two files of an adapter on disk: killed saves, links, and bytes that anyone may have sent."""

import json
import os
import random
import string
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax._cli import merging
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import TensorFile, write_tensors
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

    monkeypatch.setattr(lowrank.peft._opening, "find_tensors", late)
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


def test_matching_stops_after_many_problems(tmp_path):
    """A file of a megabyte could have thousands of them, and 20 are shown."""
    params = {f"m{i}": {"kernel": jnp.ones((4, 3))} for i in range(600)}
    factors = {
        f"base_model.model.m{i}.lora_A.weight": np.ones((2, 4), np.float32) for i in range(600)
    }
    save(tmp_path, 1.0)
    for count, text in ((600, "and more: matching stopped here"), (400, "... and 380 more")):
        with (tmp_path / TENSORS).open("wb") as file:
            write_tensors(file, dict([*factors.items()][:count]))
        with pytest.raises(lowrank.CheckpointError) as info:
            lowrank.peft.load(tmp_path, params)
        assert "base_model.model.m0.lora_B.weight: missing" in str(info.value)
        assert str(info.value).endswith(text)
        assert str(info.value).count("\n") <= 21


def test_a_merge_parses_each_header_once(tmp_path, monkeypatch):
    save(tmp_path / "adapter", 1.0)
    lowrank.huggingface.save(tmp_path / "base", PARAMS)
    paths, parse = [], TensorFile._read_header
    record = lambda file: paths.append(file.path.name) or parse(file)
    monkeypatch.setattr(TensorFile, "_read_header", record)
    for merge in (lowrank.huggingface.merge, merging.merge):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        assert sorted(paths) == [TENSORS, "model.safetensors"]
        paths.clear()
