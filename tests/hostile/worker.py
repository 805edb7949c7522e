"""Run the cases of formats within limits of memory and time; say of each how it ended.

    python tests/hostile/worker.py adapter_configs gguf_files

Prints one JSON line before each case, and one for each thing that was done with it.
"""

import importlib
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import good

from lowrank_jax import LowrankError

SPARE, SECONDS = 1 << 30, 5
LINE, LINES = 1000, 30


def check(text, place):
    """What is wrong with a message, if anything."""
    lines = text.split("\n")
    if not text or len(lines) > LINES or max(map(len, lines)) > LINE + 10:
        return f"the message is of {len(text)} characters in {len(lines)} lines"
    if any(not char.isprintable() for char in text if char != "\n"):
        return f"the message is not printable: {text!r}"
    if place is not None and str(place.parent) not in text:
        return f"the message names no path: {text!r}"
    return None


def attempt(do, argument, place):
    """How one call ended: "read", "refused", or what is wrong."""
    try:
        text = do(argument)
    except (LowrankError, good.Refused) as error:
        return check(str(error), place) or "refused"
    except MemoryError:
        return "it took more memory than it may"
    except BaseException:
        return traceback.format_exc()[-3000:]
    if any(not char.isprintable() for char in text if char != "\n"):
        return f"what it says is not printable: {text!r}"
    return "read"


def read_status(field):
    """Read a line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def limited(do, argument, place):
    """Call under a limit of processor time: how it ended, its seconds, and the bytes it took.

    The bytes are the peak resident memory of the call, less the memory before it and the files.
    """
    own = 0 if place is None else sum(path.stat().st_size for path in place.rglob("*"))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, VmHWM
    before, used = read_status("VmRSS"), time.process_time()
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS + 1, hard))
    end = attempt(do, argument, place)
    return end, time.process_time() - used, read_status("VmHWM") - before - own


def virtual():
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(name):
    warnings.simplefilter("ignore", RuntimeWarning)
    logging.disable(logging.CRITICAL)
    module = importlib.import_module(name)
    # files are flushed to disk when they are written: in memory that takes no time
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:
        root = Path(root)
        files = hasattr(module, "MAKE")
        if files:
            good.model(root / "model")
            good.adapter(root / "adapter")
            module.MAKE(root / "good")
            for do in module.DO:  # all is imported and compiled
                assert attempt(do, root / "good", None) == "read", (
                    do,
                    attempt(do, root / "good", None),
                )
        limit = virtual() + SPARE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for case, make in module.CASES.items():
            print(json.dumps([name, case]), flush=True)
            folder = root / "case"
            for other in ("case", "merged", "converted"):
                shutil.rmtree(root / other, ignore_errors=True)
            if files:
                shutil.copytree(root / "good", folder)
                make(folder)
            for do in module.DO if files else [module.make]:
                argument = folder if files else make
                end, seconds, memory = limited(do, argument, folder if files else None)
                line = [name, case, do.__name__, end, memory, round(seconds, 3)]
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(name)
