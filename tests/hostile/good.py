"""Small good files of each format, and what is done with files: load, inspect, merge, convert."""

import contextlib
import io
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lowrank
from lowrank_jax import checkpoint
from lowrank_jax._cli import main
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax.bitsandbytes import to_state_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "model.layers.0.self_attn.q_proj"
PARAMS = {
    "model": {
        "embed": {"embedding": jnp.ones((5, 4))},
        "layers": {
            "0": {"self_attn": {"q_proj": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}}
        },
        "norm": {"scale": jnp.ones(4)},
    }
}
SHAPES = jax.eval_shape(lambda: PARAMS)
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def lora(dora=False):
    node = lowrank.LowRank(
        jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones(3) if dora else None, scale=0.5
    )
    return {
        "model": {
            "embed": {"embedding": None},
            "layers": {"0": {"self_attn": {"q_proj": {"kernel": node, "bias": None}}}},
            "norm": {"scale": None},
        }
    }


def adapter(folder):
    config = lowrank.LoraConfig(rank=2, extras={"task_type": "CAUSAL_LM", "revision": "main"})
    lowrank.peft.save(folder, lora(), config)


def model(folder):
    lowrank.huggingface.save(folder, PARAMS)
    (folder / "config.json").write_text('{"architectures": ["X"], "tie_word_embeddings": false}')


def shards(folder):
    lowrank.huggingface.save(folder, PARAMS, max_shard=60)
    (folder / "config.json").write_text('{"architectures": ["X"], "tie_word_embeddings": false}')


def state_tensors():
    params = {"kernel": jnp.linspace(-1, 1, 64 * 4).reshape(64, 4)}
    node = lowrank.quantize(params, lowrank.QuantConfig(targets="kernel"))["kernel"]
    return {**to_state_dict(node, f"{LAYER}.weight"), f"{LAYER}.bias": np.zeros(4, np.float32)}


def quantized(folder, tensors=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": QUANTIZED}))
    with (folder / SINGLE).open("wb") as file:
        write_tensors(file, state_tensors() if tensors is None else tensors)


def saved(folder):
    config = lowrank.LoraConfig(rank=2, rank_pattern={"**/kernel": 2}, extras={"a": [1]})
    checkpoint.save(
        folder, lora=lora(), config=config, base=PARAMS, step=3,
        opt_state={"count": jnp.zeros((), jnp.int32)}, extra={"key": jax.random.key(0), "n": 1.5},
    )  # fmt: skip


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


def gguf_bytes(fields=(), tensors=None, counts=None, data=None, kv=None):
    """A GGUF file: fields are (key, type, bytes), tensors (name, shape, type, offset)."""
    norm = ("blk.0.attn_norm.weight", (4,), 0, 0)
    query = ("blk.0.attn_q.weight", (4, 4), 0, 32)
    tensors = [norm, query] if tensors is None else tensors
    fields = dict([
        (b"general.architecture", (8, gguf_text(b"llama"))),
        (b"llama.attention.head_count", (4, struct.pack("<I", 2))),
        (b"tokens", (9, struct.pack("<IQ", 8, 2) + gguf_text(b"a") + gguf_text(b"bc"))),
        *((key, (kind, value)) for key, kind, value in fields),
    ])  # fmt: skip
    text = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(fields))))
    for key, (kind, value) in fields.items():
        text += gguf_text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        name = name if isinstance(name, bytes) else name.encode()
        text += gguf_text(name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
        )
    text += bytes(-len(text) % 32)
    return text + (np.ones(24, np.float32).tobytes() if data is None else data)


def gguf(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").write_bytes(gguf_bytes())


# What is done with a folder; an error of the library's is the only one that may come


class Refused(Exception):
    """A command said why it did not do its work."""


def command(*arguments):
    """One command; what it printed, or Refused with it."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main([*map(str, arguments)])
    text = error.getvalue() if status else out.getvalue()
    if status:
        raise Refused(text.removeprefix("lowrank_jax: ").removesuffix("\n"))
    return text


def inspect(folder: Path):
    return command("inspect", folder)


def convert(folder: Path):
    return command("convert", folder, folder.with_name("converted"))


def merge_adapter(folder: Path):
    return command("merge", folder.with_name("model"), folder, folder.with_name("merged"))


def merge_model(folder: Path):
    return command("merge", folder, folder.with_name("adapter"), folder.with_name("merged"))


def load_adapter(folder: Path):
    return str(len(jax.tree.leaves(lowrank.peft.load(folder, SHAPES))))


def load_model(folder: Path):
    return str(len(jax.tree.leaves(lowrank.huggingface.load(folder, SHAPES))))


def load_states(folder: Path):
    return str(len(lowrank.bitsandbytes.load(folder)))


def load_quantized(folder: Path):
    shape = jax.ShapeDtypeStruct
    inner = {"kernel": shape((64, 4), jnp.float32), "bias": shape((4,), jnp.float32)}
    like = {"model": {"layers": {"0": {"self_attn": {"q_proj": inner}}}}}
    return str(len(jax.tree.leaves(lowrank.huggingface.load(folder, like))))


def load_gguf(folder: Path):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    layer = {
        "input_layernorm": {"scale": shape(4)},
        "self_attn": {"q_proj": {"kernel": shape(4, 4)}},
    }
    like = {"model": {"layers": {"0": layer}}}
    path = folder / "model.gguf"
    return str(
        len(jax.tree.leaves(lowrank.huggingface.load(path, like, names=lowrank.names.LLAMA)))
    )


def restore(folder: Path):
    return str(checkpoint.restore(folder).step)
