"""Manifests that save never wrote, and files that are not what they seem."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax.checkpoint import _archive

DEEP: Any = json.loads("[" * 900 + "]" * 900)
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 40, 1 << 62, 1 << 70, 10**4000, 0.5, -1e300),
    *("", "/", "..", "../..", "/etc/passwd", "../arrays-" + "0" * 32, "object", "float64", "uint4"),
    *("a", "b", "LowRank", "Full", "os.system", "pickle", "key<fry>", "weak", "int", "x" * 100_000),
    *([], {}, [[]], [1 << 40, 1 << 40], [-1, -1], {"re": "("}, {"re": "(a+)+" * 50}, DEEP),
]


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value within a value."""
    if at:
        yield at
    if len(at) < 8 and isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


def forged(text: bytes, generator: np.random.Generator) -> bytes:
    """Another manifest than this: text cut or filled in, or values changed, and sealed or not."""
    choose = lambda options: options[generator.integers(len(options))]
    kind = generator.integers(10)
    if kind == 0:
        return text[: generator.integers(len(text))]
    if kind == 1:
        at = generator.integers(len(text))
        return text[:at] + generator.bytes(generator.integers(1, 20)) + text[at:]
    if kind == 2:  # a name twice
        lines = text.splitlines(keepends=True)
        at = generator.integers(1, len(lines))
        return b"".join(lines[:at] + [choose(lines)] + lines[at:])
    body = json.loads(text)
    for _ in range(generator.integers(1, 4)):
        *path, last = choose(list(places(body)) or [("none",)])
        parent = body
        for key in path:
            parent = parent[key]
        change = generator.integers(5)
        if change == 0:
            parent.pop(last, None) if isinstance(parent, dict) else parent.pop(last)
        elif change == 1 and isinstance(parent, list):
            parent.insert(last, json.loads(json.dumps(parent[last])))
        elif change == 2 and isinstance(parent, dict):
            parent[repr(choose(VALUES))[:5000].strip("'")] = parent.pop(last, None)
        elif change == 3:  # a value of another place
            inner = body
            for key in choose(list(places(body)) or [()]):
                inner = inner[key]
            parent[last] = json.loads(json.dumps(inner))
        else:
            parent[last] = choose(VALUES)
    try:
        if kind > 4:
            body.pop("sha256", None)
            return _archive.serialize_manifest(body)
    except (ValueError, RecursionError):
        pass
    try:
        return json.dumps(body, indent=1).encode()
    except RecursionError:
        return b"[" * 10_000


def links(directory: Path, outside: Path) -> Iterator[str]:
    """Put a link, a pipe or a folder in the place of each file in turn, and of the folder."""
    outside.mkdir()
    (outside / "empty").mkdir()
    folder = next(directory.glob("arrays-*"))
    for path in [*(p for p in sorted(directory.rglob("*")) if p.is_file()), folder]:
        moved = outside / "moved"
        path.rename(moved)
        # the content is right: it is the place that is not
        for number, target in enumerate((moved, Path("/dev/zero"), outside / "empty", None)):
            if target is not None:
                path.symlink_to(os.path.relpath(target, path.parent) if number else target)
            else:
                os.mkfifo(path)
            if path.name != "manifest.json" or target != moved:
                yield path.name
            path.unlink()
        moved.rename(path)
    stray = folder / "payload.npy"
    for make in (lambda: stray.write_bytes(b"x"), lambda: stray.symlink_to("/dev/zero")):
        make()
        yield stray.name
        stray.unlink()
    shutil.rmtree(outside)
