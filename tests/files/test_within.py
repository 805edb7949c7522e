"""Files within a folder: links, pipes and devices that lead out of it are not read."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, huggingface
from lowrank_jax._files.shards import open_folder

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parents[1] / "golden"

LLAMA, PEFT = GOLDEN / "huggingface" / "llama", GOLDEN / "peft_files" / "lora"

PARAMS = {"q": {"kernel": jnp.ones((4, 3))}}


def copied(tmp_path):
    """A model's folder of the tests' own."""
    return shutil.copytree(LLAMA, tmp_path / "base")


def merged(base, tmp_path):
    return huggingface.merge(base, PEFT, tmp_path / "out")


def saved_like(base, tmp_path):
    with open_folder(base) as tensors:
        tree = {
            key.rpartition(".")[0]: {"kernel" if key.endswith("weight") else "bias": tensors[key]}
            for key in tensors
        }
        names = {
            f"{key.rpartition('.')[0]}/{'kernel' if key.endswith('weight') else 'bias'}": (
                lowrank.names.Parameter(*key.rpartition(".")[::2], fan_in_fan_out=True)
            )
            for key in tensors
        }
        for key in tensors:
            module, _, kind = key.rpartition(".")
            tree[module]["kernel" if kind == "weight" else "bias"] = tensors[key]
    return huggingface.save(tmp_path / "out", tree, names=names, like_folder=base)


COPIES = {"merge": merged, "save": saved_like}


def link_to_file(base, secret):
    (base / "tokenizer.json").symlink_to(secret)
    return "is a link out of its directory"


def chain(base, secret):
    (base.parent / "middle").symlink_to(secret)
    (base / "tokenizer.json").symlink_to(base / "inner.txt")
    (base / "inner.txt").symlink_to(base.parent / "middle")
    return "is a link out of its directory"


def relative(base, secret):
    (base / "tokenizer.json").symlink_to(Path("..") / secret.name)
    return "is a link out of its directory"


def through_a_folder(base, secret):
    (base / "sub").symlink_to(base.parent)
    (base / "tokenizer.json").symlink_to(Path("sub") / secret.name)
    return "is a link out of its directory"


def configuration(base, secret):
    (base / "config.json").unlink()
    secret.write_text("{}")
    (base / "config.json").symlink_to(secret)
    return "is a link out of its directory"


def false_blobs(base, secret):
    """A folder made to look like the cache's, whose blobs lead elsewhere."""
    outside = secret.parent / "outside"
    outside.mkdir()
    shutil.copy(secret, outside)
    snapshot = secret.parent / "models--x" / "snapshots"
    snapshot.mkdir(parents=True)
    base.rename(snapshot / "0a")
    (snapshot.parent / "blobs").symlink_to(outside)
    (snapshot / "0a" / "tokenizer.json").symlink_to(Path("../../blobs") / secret.name)
    base.symlink_to(snapshot / "0a")
    return "is a link out of its directory"


def nothing(base, secret):
    (base / "tokenizer.json").symlink_to(base / "lost")
    return "could not be read"


def circle(base, secret):
    (base / "tokenizer.json").symlink_to("vocab.json")
    (base / "vocab.json").symlink_to("tokenizer.json")
    return "could not be read"


def pipe(base, secret):
    os.mkfifo(base / "tokenizer.json")
    return "is not a regular file"


def device(base, secret):
    (base / "tokenizer.json").symlink_to("/dev/zero")
    return "is a link out of its directory"


def large(base, secret):
    with (base / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    return "bytes; expected at most"


ATTACKS = [
    *(link_to_file, chain, relative, through_a_folder, configuration, false_blobs, nothing),
    *(circle, pipe, device, large),
]


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_is_copied_is_of_the_folder(attack, copy, tmp_path):
    base, secret = copied(tmp_path), tmp_path / "secret"
    secret.write_text('"the secret"')
    said = attack(base, secret)
    with pytest.raises(CheckpointError, match=said):
        COPIES[copy](base, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copy", COPIES)
def test_links_within_the_folder_and_folders_are_no_matter(copy, tmp_path):
    base = copied(tmp_path)
    (base / "files").mkdir()
    (base / "files" / "tokenizer").write_text('"own"')
    (base / "tokenizer.json").symlink_to("files/tokenizer")
    (base / "folder.json").mkdir()
    COPIES[copy](base, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"own"'
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert not (tmp_path / "out" / "folder.json").exists()


@pytest.mark.parametrize("copy", COPIES)
def test_a_snapshot_of_the_hubs_cache_is_copied(copy, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a", tmp_path / "models--x" / "blobs"
    shutil.copytree(LLAMA, snapshot)
    (snapshot / "tokenizer.json").write_text('"own"')
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(Path("../../blobs") / f"{number:040x}")
    COPIES[copy](snapshot, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"own"'
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    with open_folder(snapshot) as one, open_folder(tmp_path / "out") as two:
        assert one.keys() == two.keys()


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "/dev/zero", "a/../../x", "pipe", "zero", "sub"]
)
def test_an_index_names_plain_files_of_its_folder(name, tmp_path):
    base = copied(tmp_path)
    os.mkfifo(base / "pipe")
    (base / "zero").symlink_to("/dev/zero")
    (base / "sub").mkdir()
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside its folder|lacks shards"):
        merged(base, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_pipes_and_devices_in_the_place_of_weights_are_not_opened(kind, tmp_path):
    for name in ("model.safetensors", "m.gguf"):
        path = tmp_path / name
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for folder in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError):
            huggingface.load(folder, PARAMS)
    with pytest.raises(CheckpointError):
        merged(tmp_path, tmp_path)
