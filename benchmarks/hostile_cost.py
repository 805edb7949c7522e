"""Measure the time and memory that each reader takes for its largest files of under 1 MB.

    python benchmarks/hostile_cost.py [--only load] [--profile]

Each row is one file, good or malformed, and one use of it, in a process of its own. A small file is
read first, so that imports and compilations do not count. The row then has the best processor time
of three calls, that of the first call, in which JAX may still compile, and the peak resident memory
of the third, less the memory before it and the size of the file. Rows above 0.1 s or 50 MB are
marked.
"""

import argparse
import cProfile
import functools
import gc
import io
import json
import logging
import pstats
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hostile"))
import good
from worker import read_status

import lowrank_jax as lowrank
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax.checkpoint._archive import serialize_manifest

SIZE, SECONDS, MEMORY = 1_000_000, 0.1, 50_000_000
PREFIX = "base_model.model."
SMALL = 2


def make_largest(make, size=SIZE):
    """Make the largest file of a family that is under the limit, by bisection of its count."""
    low, high = 1, SIZE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(make(middle)) < size else (low, middle)
    return make(low)


# Files


def serialize_ones(names, shape=(1, 1), size=2, dtype="F16"):
    """Make a safetensors file of float16 ones, or of another dtype with the same bytes."""
    header = {
        name: {"dtype": dtype, "shape": [*shape], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + b"\0\x3c" * (size * len(header) // 2)


def make_pairs(count):
    """Make an adapter of modules with one weight each."""
    return serialize_ones(f"{PREFIX}m{i}.lora_{x}.weight" for i in range(count) for x in "AB")


def make_halves(count):
    return serialize_ones((f"{PREFIX}m{i}.lora_A.weight" for i in range(count)), (0,), 0)


def make_strangers(count):
    return serialize_ones((f"x{i}" for i in range(count)), (0,), 0)


def make_whole(count):
    return serialize_ones((f"{PREFIX}m{i}.weight" for i in range(count)), (1,))


def make_weights(count):
    return serialize_ones(f"m{i}.weight" for i in range(count))


def make_lists(count):
    text = b"[" + b"[]," * count + b"[]]"
    return struct.pack("<Q", len(text)) + text


def make_config(**fields):
    """Make the configuration of an adapter."""
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m0"], **fields}
    return json.dumps(values, separators=(",", ":")).encode()


def make_names_of_ranks(count):
    return make_config(rank_pattern={f"m{i}": 1 for i in range(count)})


def make_regexes_of_ranks(count):
    return make_config(rank_pattern={f"m{i}|m(x|y)*": 1 for i in range(count)})


def make_three_regexes(_):
    """Make the slowest regexes known: each of many parts may match at any place."""
    slow = "(?:.*[ab]){900}"[:900]
    return make_config(
        target_modules=slow, exclude_modules=slow, rank_pattern={slow: 1}, alpha_pattern={slow: 1}
    )


def make_names_of_saved(count):
    return make_config(modules_to_save=[f"m{i}" for i in range(count)])


def make_names_of_targets(count):
    return make_config(target_modules=[f"m{i}" for i in range(count)])


def make_layers(count):
    return make_config(layers_to_transform=[*range(count)], layers_pattern=["l"] * (count // 2))


def make_tokens(count):
    return make_config(trainable_token_indices={f"m{i}": [i] for i in range(count)})


def make_index(count):
    where = {f"m{i}.weight": "model-00001-of-00001.safetensors" for i in range(count)}
    return json.dumps({"weight_map": where}, separators=(",", ":")).encode()


def make_index_of_files(count):
    where = {f"m{i}": f"{i}" for i in range(count)}
    return json.dumps({"weight_map": where}, separators=(",", ":")).encode()


def make_objects(count):
    return b'{"a":' + b"[" + b"{}," * count + b"{}]}"


def make_gguf_fields(count):
    return good.gguf_bytes([(b"%d" % i, 0, b"\0") for i in range(count)])


def make_gguf_tensors(count):
    return good.gguf_bytes(
        tensors=[(f"t{i}", (1,), 0, 4 * i) for i in range(count)], data=bytes(4 * count)
    )


def make_gguf_layers(count):
    named = [(f"blk.{i}.attn_norm.weight", (1,), 0, 4 * i) for i in range(count)]
    return good.gguf_bytes(tensors=named, data=bytes(4 * count))


def make_gguf_texts(count):
    texts = struct.pack("<IQ", 8, count) + bytes(8 * count)
    return good.gguf_bytes([(b"texts", 9, texts)])


@functools.cache
def make_state():
    """Make the tensors of one weight in 4 bits, as bitsandbytes names them."""
    params = {"kernel": jnp.linspace(-1, 1, 64).reshape(64, 1)}
    quant = lowrank.QuantConfig(targets="kernel", double_quant=False)
    node = lowrank.quantize(params, quant)["kernel"]
    return lowrank.bitsandbytes.to_state_dict(node, "weight")


def serialize(named):
    file = io.BytesIO()
    write_tensors(file, named)
    return file.getvalue()


def make_states(count):
    """Make a model's file with weights in 4 bits."""
    state = make_state()
    return serialize({f"m{i}.{key}": state[key] for i in range(count) for key in state})


def make_states_of_nothing(count):
    name = "m{}.quant_state.bitsandbytes__nf4"
    return serialize({name.format(i): np.zeros(1, np.uint8) for i in range(count)})


# Uses of a file: each writes bytes to a folder, and returns the call to measure


def count_tensors(data):
    """Count the tensors in the header of a safetensors file."""
    try:
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        return len(header) if isinstance(header, dict) else SMALL
    except (ValueError, struct.error):
        return SMALL


def make_leaves(count, shape=(1, 1)):
    return {f"m{i}": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for i in range(count)}


def write_adapter(folder, data):
    """Write the tensors of an adapter, or its configuration, with a good other file."""
    good.adapter(folder)
    is_config = data[:1] == b"{"
    (folder / (good.CONFIG if is_config else good.ADAPTER)).write_bytes(data)
    if not is_config:
        (folder / good.CONFIG).write_bytes(make_config())
    elif b'"target_modules":["m' in data or b'"target_modules":"' in data:
        names = [("m" + "ab" * 300)[: 5 + i] for i in range(500)]
        keys = (f"{PREFIX}{name}.lora_{x}.weight" for name in names for x in "AB")
        (folder / good.ADAPTER).write_bytes(serialize_ones(keys))


def load_adapter(folder, data):
    write_adapter(folder, data)
    like = make_leaves(count_tensors((folder / good.ADAPTER).read_bytes()) // 2)
    return lambda: lowrank.peft.load(folder, like)


def inspect_adapter(folder, data):
    write_adapter(folder, data)
    return lambda: good.inspect(folder)


def convert_adapter(folder, data):
    write_adapter(folder, data)
    return lambda: good.convert(folder)


def merge_adapter(folder, data):
    write_adapter(folder, data)
    model = folder.with_name("model")
    good.model(model)
    count = count_tensors((folder / good.ADAPTER).read_bytes())
    (model / good.SINGLE).write_bytes(make_weights(count // 2))
    return lambda: good.merge_adapter(folder)


def write_model(folder, data):
    good.model(folder)
    (folder / good.SINGLE).write_bytes(data)


def load_model(folder, data):
    write_model(folder, data)
    like = make_leaves(count_tensors(data))
    return lambda: lowrank.huggingface.load(folder, like)


def inspect_model(folder, data):
    write_model(folder, data)
    return lambda: good.inspect(folder)


def write_shards(folder, data):
    good.shards(folder)
    count = len(json.loads(data).get("weight_map", ()))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model-00001-of-00001.safetensors").write_bytes(make_weights(count))
    (folder / good.INDEX).write_bytes(data)


def load_shards(folder, data):
    write_shards(folder, data)
    like = make_leaves(len(json.loads(data).get("weight_map", ())))
    return lambda: lowrank.huggingface.load(folder, like)


def inspect_shards(folder, data):
    write_shards(folder, data)
    return lambda: good.inspect(folder)


def write_quantized(folder, data):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": good.QUANTIZED}))
    (folder / good.SINGLE).write_bytes(data)


def load_states(folder, data):
    write_quantized(folder, data)
    return lambda: lowrank.bitsandbytes.load(folder)


def inspect_states(folder, data):
    write_quantized(folder, data)
    return lambda: good.inspect(folder)


def load_gguf(folder, data):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(data)
    return lambda: good.load_gguf(folder)


def inspect_model_config(folder, data):
    good.model(folder)
    (folder / "config.json").write_bytes(data)
    return lambda: good.inspect(folder)


def write_checkpoint(folder, count):
    """Write a checkpoint of a number of modules."""
    nodes = {
        f"m{i}": {"kernel": lowrank.LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))}
        for i in range(count)
    }
    lowrank.checkpoint.save(folder, lora=nodes, config=lowrank.LoraConfig(rank=1))


def restore(folder, count):
    write_checkpoint(folder, count)
    return lambda: lowrank.checkpoint.restore(folder)


def inspect_checkpoint(folder, count):
    write_checkpoint(folder, count)
    return lambda: good.inspect(folder)


def convert_checkpoint(folder, count):
    write_checkpoint(folder, count)
    return lambda: good.convert(folder)


def forge(change):
    """Return a use that changes a small checkpoint's manifest to the largest under the limit."""

    def do(folder, count):
        write_checkpoint(folder, 1)
        path = folder / "manifest.json"
        body = json.loads(path.read_bytes())
        body.pop("sha256")
        if count == SMALL:
            path.write_bytes(serialize_manifest(change(body, SMALL)))
        else:
            path.write_bytes(
                make_largest(lambda n: serialize_manifest(change(json.loads(json.dumps(body)), n)))
            )
        return lambda: lowrank.checkpoint.restore(folder)

    return do


def add_arrays(body, count):
    body["arrays"] |= {f"lora/{i}": [[1], "float32", "0"] for i in range(count)}
    return body


def add_nodes(body, count):
    body["lora"] = [{**body["lora"][0], "path": [f"m{i}", "kernel"]} for i in range(count)]
    return body


def add_ranks(body, count):
    body["config"]["rank_pattern"] = {f"m{i}": 1 for i in range(count)}
    return body


def read_dict(make):
    """Return a use that reads a dictionary of a count of values."""

    def do(_, count):
        values = make(count)
        return lambda: lowrank.LoraConfig.from_dict(values)

    return do


ADAPTER = {
    "load": load_adapter, "inspect": inspect_adapter,
    "convert": convert_adapter, "merge": merge_adapter,
}  # fmt: skip
# family of files by a count -> its uses
FILES = {
    **dict.fromkeys((make_pairs, make_halves, make_strangers, make_whole), ADAPTER),
    make_lists: {"load": load_adapter},
    **dict.fromkeys(
        (
            make_names_of_ranks,
            make_regexes_of_ranks,
            make_names_of_saved,
            make_names_of_targets,
            make_layers,
            make_tokens,
        ),
        ADAPTER,
    ),
    make_three_regexes: ADAPTER,
    make_weights: {"load": load_model, "inspect": inspect_model},
    make_index: {"load": load_shards, "inspect": inspect_shards},
    make_index_of_files: {"load": load_shards, "inspect": inspect_shards},
    make_objects: {"inspect": inspect_model_config},
    make_states: {"load": load_states, "inspect": inspect_states},
    make_states_of_nothing: {"load": load_states},
    **{
        make: {"load": load_gguf}
        for make in (make_gguf_fields, make_gguf_tensors, make_gguf_layers, make_gguf_texts)
    },
}
# what is not one file of bytes: name -> (the count that makes about 1 MB, its uses)
COUNTS = {
    "checkpoint of pairs": (1200, {
        "restore": restore, "inspect": inspect_checkpoint, "convert": convert_checkpoint,
    }),
    "manifest: arrays": (SIZE, {"restore": forge(add_arrays)}),
    "manifest: nodes": (SIZE, {"restore": forge(add_nodes)}),
    "manifest: ranks": (SIZE, {"restore": forge(add_ranks)}),
    "from_dict: targets": (80_000, {
        "from_dict": read_dict(lambda n: {"targets": [f"**/a{i}" for i in range(n)]}),
    }),
    "from_dict: ranks": (80_000, {
        "from_dict": read_dict(lambda n: {"rank_pattern": {f"a{i}": i + 1 for i in range(n)}}),
    }),
    "from_dict: regexes": (50_000, {
        "from_dict": read_dict(lambda n: {"targets": [{"re": f"a{i}"} for i in range(n)]}),
    }),
    "from_dict: a long regex": (900_000, {
        "from_dict": read_dict(lambda n: {"targets": {"re": "a" * n}}),
    }),
    "from_dict: classes": (30_000, {
        "from_dict": read_dict(lambda n: {"targets": {"re": "[\u0100\u0300\u0500\u0700]" * n}}),
    }),
    "from_dict: a range in any case": (1, {
        "from_dict": read_dict(lambda n: {"targets": {"re": "(?i)[\0-\U0010ffff]"}}),
    }),
    "from_dict: extras": (100_000, {
        "from_dict": read_dict(lambda n: {"extras": {"a": [[i] for i in range(n)]}}),
    }),
}  # fmt: skip


def name_row(make, verb):
    return f"{make.__name__.removeprefix('make_')}: {verb}"


ROWS = {name_row(make, verb): (make, None, do) for make, dos in FILES.items()
        for verb, do in dos.items()}  # fmt: skip
ROWS |= {f"{what}: {verb}": (None, n, do) for what, (n, dos) in COUNTS.items()
         for verb, do in dos.items()}  # fmt: skip


def attempt(call):
    """Call, and return how that ended, with the message of an error."""
    try:
        call()
    except (lowrank.LowrankError, good.Refused) as error:
        return "refused", str(error)
    return "read", ""


def remove_outputs(root):
    for name in ("converted", "merged"):
        shutil.rmtree(root / name, ignore_errors=True)


def measure_row(row, profile):
    """Measure a row in this process: how it ended, seconds of the best and first call, bytes."""
    warnings.simplefilter("ignore", RuntimeWarning)
    logging.disable(logging.CRITICAL)
    make, count, do = ROWS[row]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        small, large = Path(root, "1/small"), Path(root, "2/large")
        small.parent.mkdir(), large.parent.mkdir()
        attempt(do(small, make(SMALL) if make else min(SMALL, count)))
        data = make_largest(make) if make else None
        call = do(large, data if make else count)
        seconds = []
        for _ in range(3):
            remove_outputs(large.parent)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before, start = read_status("VmRSS"), time.process_time()
            end, text = attempt(call)
            seconds.append(time.process_time() - start)
            memory = read_status("VmHWM") - before
        if profile:
            remove_outputs(large.parent)
            profiler = cProfile.Profile()
            profiler.runcall(attempt, call)
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats(45)
            print(text[:600], file=sys.stderr)
    return end, min(seconds), seconds[0], memory - len(data or b"")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument(
        "--profile", action="store_true", help="print the functions that take the time"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure_row(options.row, options.profile)))
        return
    print(f"{'file: use':40} {'end':8} {'s':>7} {'first':>7} {'MB':>7}")
    for row in ROWS:
        if options.only not in row:
            continue
        command = [sys.executable, __file__, "--row", row]
        command += ["--profile"] * options.profile
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
        if done.returncode:
            print(f"{row:40} failed")
            continue
        end, best, first, memory = json.loads(done.stdout.splitlines()[-1])
        mark = "  <--" if best > SECONDS or memory > MEMORY else ""
        line = f"{row:40} {end:8} {best:7.3f} {first:7.3f} {memory / 1e6:7.1f}{mark}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
