"""safetensors files: headers that do not describe the file, every dtype, memory of writing."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import HEADER_LIMIT, TensorFile, write_tensors

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
