"""Change good files at random and read them: what comes is a result or an error of the library's.

    python tests/support/fuzz_files.py --seconds 600 --parser adapter_config

Prints how many files were read and how many refused. Ends with status 1 on any other exception, on
a file that takes more than half a second of processor time, or where memory grows.
"""

import argparse
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
import good
from worker import attempt

import lowrank_jax as lowrank
from lowrank_jax.checkpoint._archive import serialize_manifest

SLOW, GROWTH = 0.5, 200 << 20
VALUES = [None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**62, 2**63, 10**400, -0.5, 1e308, 1e-320]
VALUES += [float("nan"), float("inf"), "", "x", "\0", "\ud800", "\x1b[2J", "F32", "nf4", "a" * 500]
VALUES += ["(a|a)*", "(?!x).*", "**/q*", "../x", [], {}, [[]], [1, 2], ["q"], {"q": 2}, {"(": 1}]
NUMBERS = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]


def flipped(data, chance):
    """Bytes with some changed, cut away, doubled, or replaced by a number."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, end = sorted(chance.choices(range(len(data) + 1), k=2))
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : min(end, at + chance.randint(1, 64))]
            case 2:
                data[at:at] = data[at : at + 16] * chance.choice((1, 1, 50))
            case 3:
                del data[at:]
            case 4:
                number = chance.choice(NUMBERS)
                data[at : at + 8] = struct.pack("<Q", number)
            case 5:
                data[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
    return bytes(data)


def changed(value, chance):
    """A JSON value with a part of it replaced, left out, or put in another place."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        found, key = dict(value), chance.choice([*value])
        match chance.randrange(8):
            case 0:
                del found[key]
            case 1:
                found[chance.choice([key + "x", key[:-1], "\x1b" + key, key * 40])] = found[key]
            case 2:
                found[key] = found[chance.choice([*value])]
            case _:
                found[key] = changed(found[key], chance)
        return found
    if isinstance(value, list) and value and chance.random() < 0.85:
        found, at = [*value], chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                del found[at]
            case 1:
                found *= chance.choice((2, 50))
            case _:
                found[at] = changed(found[at], chance)
        return found
    if isinstance(value, str) and value and chance.random() < 0.4:
        at = chance.randrange(len(value))
        return (
            value[:at]
            + chance.choice(["", "{}", "/", ".", "\n", "9" * 20, "(", "*", "é"])
            + value[at + 1 :]
        )
    if isinstance(value, int) and chance.random() < 0.4:
        return value + chance.choice((-1, 1, 2**31, -(2**63)))
    if chance.random() < 0.1:
        return [value]
    return chance.choice(VALUES)


def several(value, chance):
    for _ in range(chance.choice((1, 1, 2, 4))):
        value = changed(value, chance)
    return value


def text_of(value):
    return json.dumps(value).encode()


def of_json(data, chance):
    """The text of an object, changed as a text or as an object."""
    return (
        flipped(data, chance)
        if chance.random() < 0.3
        else text_of(several(json.loads(data), chance))
    )


def of_tensors(data, chance):
    """A safetensors file, its header changed as an object, most times."""
    if chance.random() < 0.3:
        return flipped(data, chance)
    size = struct.unpack("<Q", data[:8])[0]
    header = text_of(several(json.loads(data[8 : 8 + size]), chance))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def of_states(data, chance):
    """A safetensors file with a quant state, that JSON or its tensors changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    key = next(key for key in header if ".quant_state." in key)
    if chance.random() < 0.3:
        return of_tensors(data, chance)
    start, stop = (8 + size + x for x in header[key]["data_offsets"])
    inner = of_json(data[start:stop], chance)
    shift = len(inner) - (stop - start)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [
                x + shift * (x > start - 8 - size) for x in entry["data_offsets"]
            ]
    header[key]["shape"] = [len(inner)]
    text = text_of(header)
    return struct.pack("<Q", len(text)) + text + data[8 + size : start] + inner + data[stop:]


def of_manifest(data, chance):
    """A manifest, sealed anew most times."""
    if chance.random() < 0.2:
        return flipped(data, chance)
    body = json.loads(data)
    body.pop("sha256")
    try:
        return serialize_manifest({**body, **several(body, chance)})
    except (ValueError, TypeError):
        return flipped(data, chance)


def both(one, two):
    def do(folder):
        try:
            return one(folder)
        except (lowrank.LowrankError, good.Refused):
            two(folder)
            raise

    return do


# parser -> how a good folder is made, the file that is changed, how, and what is done with it
PARSERS = {
    "safetensors": (good.adapter, good.ADAPTER, of_tensors, both(good.load_adapter, good.inspect)),
    "model": (good.model, good.SINGLE, of_tensors, both(good.load_model, good.merge_model)),
    "config": (good.model, "config.json", of_json, both(good.load_model, good.inspect)),
    "index": (good.shards, good.INDEX, of_json, both(good.load_model, good.inspect)),
    "adapter_config": (good.adapter, good.CONFIG, of_json, both(good.load_adapter, good.inspect)),
    "convert": (good.adapter, good.ADAPTER, of_tensors, good.convert),
    "merge": (good.adapter, good.CONFIG, of_json, good.merge_adapter),
    "quant_state": (
        good.quantized,
        good.SINGLE,
        of_states,
        both(good.load_states, good.load_quantized),
    ),
    "gguf": (good.gguf, "model.gguf", flipped, good.load_gguf),
    "manifest": (good.saved, "manifest.json", of_manifest, good.restore),
    "from_dict": (None, "", None, None),
}
CONFIGS = [
    lowrank.LoraConfig(
        rank=4, alpha=2.0, targets=("**/q", "x*"), rank_pattern={"a": 2, "b": 3}, train="norm",
        alpha_pattern={"a": 1.0}, stack={"c": (0,)}, axes={"d": ((0,), (1,))},
        train_rows={"e": (1,)}, extras={"a": [1, {"b": None}]},
    ),
    lowrank.QuantConfig(targets=("a", "b"), exclude="c"),
]  # fmt: skip


def from_dict(chance):
    """Read a configuration of changed values, and write it again."""
    config = chance.choice(CONFIGS)
    values = several(config.to_dict(), chance)

    def do(_):
        found = type(config).from_dict(values)
        assert type(config).from_dict(found.to_dict()) == found
        return "read"

    return do


def resident():
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fuzz(name, root, seed, until):
    """Read files until `until(count)`; the counts, and what is wrong."""
    make, file, mutate, do = PARSERS[name]
    chance, counts, wrong = random.Random(f"{name} {seed}"), {"read": 0, "refused": 0}, []
    folder, count, least = root / "folder", 0, None
    if make is not None:
        good.model(root / "model")
        good.adapter(root / "adapter")
        make(folder)
        data = (folder / file).read_bytes()
        assert attempt(do, folder, None) == "read"
    while not until(count):
        count += 1
        if make is None:
            do, sample = from_dict(chance), b""
        else:
            sample = mutate(data, chance)
            (folder / file).write_bytes(sample)
        start = time.process_time()
        end = attempt(do, folder, folder if make else None)
        seconds = time.process_time() - start
        for other in ("merged", "converted"):
            shutil.rmtree(root / other, ignore_errors=True)
        # what is compiled or imported at a first time is no fault of the file
        if seconds > SLOW and end in counts:
            start = time.process_time()
            attempt(do, folder, None)
            seconds = time.process_time() - start
            end = f"it took {seconds:.2f} seconds" if seconds > SLOW else end
        if end in counts:
            counts[end] += 1
        else:
            wrong.append((name, seed, count, end, sample[:2000]))
        if count == 200:
            least = resident()
    if least is not None and resident() - least > GROWTH:
        wrong.append((name, seed, count, f"memory grew by {resident() - least} bytes", b""))
    return counts, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--parser", choices=[*PARSERS], required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as root:
        counts, wrong = fuzz(
            options.parser, Path(root), options.seed, lambda _: time.monotonic() > end
        )
    total = sum(counts.values()) + len(wrong)
    print(
        f"{options.parser}: {total} files, {counts['read']} read, {counts['refused']} refused, "
        f"{len(wrong)} wrong"
    )
    for name, seed, count, what, sample in wrong[:10]:
        print(f"{name}, seed {seed}, file {count}: {what}\n{sample!r}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
