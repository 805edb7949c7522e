"""What a checkpoint survives: kills, failing disks, flipped bits, forged manifests, two writers.

    python tests/benchmarks/faults.py --kills 200 --errors 1 --flips 10000 --manifests 10000 \
        --writers 20

`--forms` names what is written: a checkpoint, an adapter of PEFT's (with the configuration as it
was, or another), a model of Hugging Face's (forms.py); bits are flipped, and manifests forged, of
checkpoints alone.

Processes that save are forks of this one, which has imported all and started no thread: nothing is
imported again for each kill. `--errors N` fails every Nth call that writes, flushes, renames or
opens for writing, of every library of the process, C++ too (failing_calls.c by LD_PRELOAD, which
needs cc), then limits the size of files, and fills a disk (a tmpfs, where mounting one is allowed).
"""

import argparse
import collections
import ctypes
import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint  # noqa: F401  imported before the forks
from forged import forged, links
from forms import FORMS, GONE, Form, entries

from lowrank_jax import CheckpointError, checkpoint

SOURCE = Path(__file__).with_name("failing_calls.c")


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does a work, which writes to a pipe; its id and the pipe's other end."""
    reader, writer = os.pipe()
    if process := os.fork():
        os.close(writer)
        return process, reader
    code = 1
    try:
        os.close(reader)
        work(writer)
        code = 0
    finally:
        os._exit(code)


def told(process: int, reader: int) -> str:
    """All that a process wrote, once it is over; how it ended if it wrote nothing."""
    with os.fdopen(reader) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return text or json.dumps([f"ended by {code}", ""])


# Kills


def kills(form: Form, count: int, folder: Path, seed: int) -> Callable[[], str]:
    """Kill processes that save again and again; the result looks at what they left."""
    generator, least, left = np.random.default_rng(seed), {}, 0
    for number in range(count):
        directory = folder / f"killed-{form.name}-{number}"
        shutil.copytree(folder / form.name, directory)

        def work(writer: int, directory: Path = directory) -> None:
            for step in range(2, 10**6):
                form.save(directory, step)
                os.write(writer, f"{step}\n".encode())

        process, reader = forked(work)
        steps = os.read(reader, 100)
        time.sleep(generator.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        with os.fdopen(reader) as file:
            steps += file.read().encode()
        os.waitpid(process, 0)
        least[directory] = int(steps.split()[-1])
        left += form.orphans(directory) > 0

    def verdict() -> str:
        found = {directory: form.whole(directory) for directory in least}
        gone = sum(step == GONE for step in found.values())
        torn = sum(step is None for step in found.values())
        lost = sum(step not in (None, GONE, least[d], least[d] + 1) for d, step in found.items())
        for directory in least:
            form.save(directory, 0)
        remain = sum(form.orphans(directory) for directory in least)
        return (
            f"kills: {count}, {left} of them amid a save: {torn} torn, {lost} of another step, "
            + (f"{gone} without an entry, " if form.name != "checkpoint" else "")
            + f"{remain} orphans after the next save"
        )

    return verdict


# Errors


def attempt(
    form: Form, directory: Path, prepare: Callable[[], None], after: Callable[[], str] = str
) -> list:
    """In a process of its own, save step 2: what came of it, and what `after` says."""

    def work(writer: int) -> None:
        form.save(directory.parent / f"warm-{form.name}", 0)
        prepare()
        try:
            form.save(directory, 2, rows=512)
            outcome = "saved"
        except CheckpointError as error:
            said = {"holds the new": "in place", "could not be restored": "set aside"}
            outcome = next((v for k, v in said.items() if k in str(error)), "CheckpointError")
        except BaseException as error:
            outcome = repr(error)
        os.write(writer, json.dumps([outcome, after()]).encode())

    return json.loads(told(*forked(work)))


def errors(form: Form, every: int, folder: Path) -> Iterator[Callable[[], str]]:
    """Let calls fail, files be too large and disks be full, in turn."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.failed_call.restype = ctypes.c_char_p
    call = lambda: library.failed_call().decode()
    arm = lambda *numbers: lambda: library.fail_calls(*numbers)
    count = lambda: str(library.counted_calls())
    directory = shutil.copytree(folder / form.name, folder / f"counted-{form.name}")
    calls = int(attempt(form, directory, arm(10**9, 10**9, 0), count)[1])
    turns = range(1, calls + 1, every)
    one = [(arm(n, n, errno.EIO), call) for n in turns]
    yield tried(form, "errors (EIO, one call)", folder, one)
    onward = [(arm(n, 10**9, errno.ENOSPC), call) for n in turns]
    yield tried(form, "errors (ENOSPC, all calls from one on)", folder, onward)
    limit = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sizes = [(limit(size), str) for size in range(0, 4096, 128 * every)]
    yield tried(form, "limited size of files", folder, sizes)


def tried(form: Form, what: str, folder: Path, cases: list) -> Callable[[], str]:
    """Try to save in each case; the result compares."""
    before, results = entries(folder / form.name), []
    for number, (prepare, after) in enumerate(cases):
        directory = shutil.copytree(folder / form.name, folder / f"{what}-{form.name}-{number}")
        outcome, failed = attempt(form, directory, prepare, after)
        results.append((directory, outcome, failed))

    def verdict() -> str:
        outcomes, changed, torn, remain = collections.Counter(), 0, 0, 0
        names = collections.Counter(failed for _, _, failed in results)
        tolerated = collections.Counter()
        for directory, outcome, failed in results:
            outcomes[outcome] += 1
            now = entries(directory)
            if outcome in ("saved", "in place"):
                torn += form.whole(directory) != 2
                tolerated[failed] += 1
            elif outcome == "set aside":
                torn += form.whole(directory) not in (1, 2, GONE)
            elif any(now.get(name) != content for name, content in before.items()):
                changed += 1
                torn += form.whole(directory) not in (1, 2)
                print(f"{directory.name} at {failed}: the old checkpoint changed")
            form.save(directory, 0)
            remain += form.orphans(directory)
        return (
            f"{what}: {len(results)} {dict(names)}: {dict(outcomes)}, {changed} old ones changed, "
            f"{torn} torn, {remain} orphans after the next save; saved although: {dict(tolerated)}"
        )

    return verdict


def full_disks(form: Form, every: int, folder: Path) -> Callable[[], str]:
    """Save on a disk that has from no page to enough of them free."""
    disk = folder / f"disk-{form.name}"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return lambda: "full disks: none, for mounting a tmpfs is not allowed here"
    outcomes, changed, left, pages = collections.Counter(), 0, 0, range(0, 48, every)
    try:
        attempt(form, disk / "x", lambda: None)  # makes the one to warm up
        for free in pages:
            shutil.rmtree(disk / "x", ignore_errors=True)
            shutil.copytree(folder / form.name, disk / "x")
            before = entries(disk / "x")

            def fill(free: int = free) -> None:
                room = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes((room.f_bavail - free) * room.f_bsize))

            outcome, _ = attempt(form, disk / "x", fill)
            (disk / "filler").unlink(missing_ok=True)
            outcomes[outcome] += 1
            now = entries(disk / "x")
            if outcome != "saved":
                changed += any(now.get(name) != content for name, content in before.items())
                left += len(now.keys() - before.keys()) > 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return lambda: (
        f"full disks: {len(pages)}: {dict(outcomes)}, {changed} old ones changed, {left} with "
        "something left until the next save"
    )


# Damage


def refused(directory: Path) -> tuple[str, float]:
    """How restoring ends, and the seconds of CPU it takes."""
    began = time.process_time()
    try:
        found = checkpoint.restore(directory)
        arrays = [*_arrays(found.lora), *_arrays(found.opt_state), *_arrays(found.extra)]
        outcome = "wrong" if any((a != 1).any() for a in arrays) else "restored"
    except CheckpointError:
        outcome = "CheckpointError"
    except BaseException as error:
        outcome = repr(error)[:200]
    return outcome, time.process_time() - began


def warm(old: Path, directory: Path) -> Path:
    """A copy that has been restored once; what is imported is no garbage to look through again."""
    shutil.copytree(old, directory)
    assert refused(directory)[0] == "restored"
    gc.collect()
    gc.freeze()
    return directory


def _arrays(tree: object) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def summary(what: str, results: list[tuple[str, float]]) -> str:
    """One line of results."""
    outcomes = collections.Counter(outcome for outcome, _ in results)
    most = 1000 * max((seconds for _, seconds in results), default=0)
    return f"{what}: {len(results)}: {dict(outcomes)}, at most {most:.0f} ms of CPU each"


def flips(count: int, folder: Path, seed: int) -> str:
    """Flip one bit of one file at a time."""
    directory = warm(folder / "checkpoint", folder / "flipped")
    starts, size = {}, 0
    for name, content in entries(directory).items():
        starts, size = {name: size, **starts}, size + len(content)
    generator, total, results = np.random.default_rng(seed), 8 * size, []
    for bit in generator.choice(total, min(count, total), replace=False).tolist():
        at, number = divmod(bit, 8)
        name = next(name for name, start in starts.items() if at >= start)
        at -= starts[name]
        with (directory / name).open("r+b", buffering=0) as file:
            content = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([content[0] ^ 1 << number]), at)
            results.append(refused(directory))
            os.pwrite(file.fileno(), content, at)
    assert refused(directory)[0] == "restored"
    return summary(f"flipped bits, of {total}", results)


def manifests(count: int, folder: Path, seed: int) -> str:
    """Forge the manifest, and put links in the place of files."""
    directory = warm(folder / "checkpoint", folder / "forged")
    path, generator, results = directory / "manifest.json", np.random.default_rng(seed), []
    text = path.read_bytes()
    for _ in range(count):
        path.write_bytes(forged(text, generator))
        results.append(refused(directory))
    path.write_bytes(text)
    linked = [refused(directory) for _ in links(directory, folder / "outside")]
    return summary("forged manifests", results) + "\n" + summary("links", linked)


# Writers


def writers(form: Form, rounds: int, folder: Path) -> Callable[[], str]:
    """Two processes that save to one path at once, again and again."""
    outcomes, directory, longest = collections.Counter(), folder / f"shared-{form.name}", 0.0
    for number in range(rounds):
        start = time.time() + 0.3

        def work(writer: int, start: float = start, number: int = number) -> None:
            form.save(folder / f"warm-{os.getpid()}", 0)
            time.sleep(max(0, start - time.time()))
            began = time.time()
            try:
                form.save(directory, number)
                outcome = "saved"
            except CheckpointError as error:
                outcome = "refused" if "another save" in str(error) else str(error)
            os.write(writer, json.dumps([outcome, time.time() - began]).encode())

        for process in [forked(work), forked(work)]:
            outcome, seconds = json.loads(told(*process))
            outcomes[outcome] += 1
            longest = max(longest, seconds)
    return lambda: (
        f"two writers: {rounds} rounds: {dict(outcomes)}, the longest {longest:.2f} s, the last is "
        f"{'whole' if form.whole(directory) == rounds - 1 else 'TORN'}"
    )


def preloaded() -> None:
    """Start this program again with calls that can fail."""
    if "LD_PRELOAD" not in os.environ:
        library = Path(tempfile.mkdtemp()) / "failing_calls.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    """Print a line for each kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("kills", "errors", "flips", "manifests", "writers"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["checkpoint"])
    options = parser.parse_args()
    if options.errors:
        preloaded()
    with tempfile.TemporaryDirectory() as name:
        folder, verdicts = Path(name), []
        forms = [FORMS[form] for form in options.forms]
        for form in forms:
            told(*forked(lambda _, form=form: form.save(folder / form.name, 1)))
        # all forks come first: looking at what they left starts threads
        for form in forms:
            if options.kills:
                verdicts.append(kills(form, options.kills, folder, options.seed))
            if options.errors:
                verdicts += errors(form, options.errors, folder)
                verdicts.append(full_disks(form, options.errors, folder))
            if options.writers:
                verdicts.append(writers(form, options.writers, folder))
        for verdict in verdicts:
            print(verdict(), flush=True)
        if options.flips:
            print(flips(options.flips, folder, options.seed), flush=True)
        if options.manifests:
            print(manifests(options.manifests, folder, options.seed), flush=True)


if __name__ == "__main__":
    main()
