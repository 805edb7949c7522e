"""Writers under attack: links, rival writers, failing calls, hostile names and paths."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint, huggingface, peft
from lowrank_jax._cli import main
from lowrank_jax._display.text import to_printable
from lowrank_jax._files.shards import open_folder
from lowrank_jax.checkpoint import _quiet

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parent / "golden"
BENCHMARKS = Path(__file__).parent / "benchmarks"
LLAMA, PEFT = GOLDEN / "huggingface" / "llama", GOLDEN / "peft_files" / "lora"
sys.path.insert(0, str(BENCHMARKS))
from forms import FORMS, GONE  # noqa: E402

NODE = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
PARAMS = {"q": {"kernel": jnp.ones((4, 3))}}
CONFIG = lowrank.LoraConfig(rank=2, targets="**/kernel")


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


# Links


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


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "x.bin", ".x.safetensors"])
def test_a_shard_does_not_take_the_name_of_another_file(name, tmp_path):
    base = copied(tmp_path)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shard = sorted({*index["weight_map"].values()})[0]
    (base / shard).replace(base / name)
    where = {key: name if file == shard else file for key, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError):
        merged(base, tmp_path)
    assert not (tmp_path / "out").exists()


# Rival writers


def program(code, *arguments):
    env = {**os.environ, "PYTHONPATH": f"{Path(lowrank.__file__).parents[1]}:{BENCHMARKS}"}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


RIVAL = """
import collections, sys
from pathlib import Path
from forms import FORMS
from lowrank_jax import CheckpointError

form, directory = FORMS[sys.argv[1]], Path(sys.argv[2])
own, rounds = map(int, sys.argv[3:])
form.save(directory.parent / f"warm-{own}", 0)
print("ready", flush=True)
outcomes = collections.Counter()
for number in range(rounds):
    try:
        form.save(directory, 2 * number + own)
        outcomes["saved"] += 1
    except CheckpointError as error:
        outcomes["refused" if "another save is writing to" in str(error) else str(error)] += 1
print(dict(outcomes), flush=True)
"""


def rivals(form, directory, rounds):
    """Two processes save to one path again and again; what came of it."""
    works = [program(RIVAL, form, directory, i, rounds) for i in (0, 1)]
    outcomes = []
    for work in works:
        out, err = work.communicate()
        assert work.returncode == 0, err
        outcomes.append(out.splitlines()[-1])
    return outcomes


def check_rivals(form, tmp_path, rounds):
    directory = tmp_path / "shared"
    for outcome in rivals(form, directory, rounds):
        assert re.fullmatch(r"\{('(saved|refused)': \d+(, )?)+\}", outcome), outcome
    assert FORMS[form].whole(directory) not in (None, GONE)
    assert FORMS[form].orphans(directory) == 0


@pytest.mark.parametrize("form", ["peft-config", "huggingface"])
def test_two_writers_leave_one_whole_folder(form, tmp_path):
    check_rivals(form, tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_writers_of_many_rounds(form, tmp_path):
    check_rivals(form, tmp_path, 300)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_writer_errs_at_once_and_changes_nothing(form, tmp_path, monkeypatch):
    form, fsync, seen = FORMS[form], os.fsync, []
    form.save(tmp_path / "x", 1)

    def rival():
        with pytest.raises(CheckpointError, match="another save is writing to"):
            form.save(tmp_path / "x", 5)
        seen.append(True)

    def met(handle):
        if not seen:
            thread = threading.Thread(target=rival)
            seen.append(None)
            thread.start()
            thread.join()
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", met)
        form.save(tmp_path / "x", 2)
    assert seen == [None, True]
    assert form.whole(tmp_path / "x") == 2
    assert form.orphans(tmp_path / "x") == 0


ENDLESS = RIVAL.replace("range(rounds)", "range(10**6)")


def check_killed_writers(form, tmp_path, kills):
    directory, chance = tmp_path / "x", np.random.default_rng(0)
    for number in range(kills):
        with program(ENDLESS, form, directory, 0, 0) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
        if directory.exists():
            assert FORMS[form].whole(directory) is not None
        FORMS[form].save(directory, number)  # the lock died with its process
        assert FORMS[form].whole(directory) == number
        assert FORMS[form].orphans(directory) == 0


@pytest.mark.parametrize("form", ["peft-config", "huggingface"])
def test_a_killed_writer_does_not_hinder_the_next(form, tmp_path):
    check_killed_writers(form, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_many_killed_writers_do_not_hinder_the_next(form, tmp_path):
    check_killed_writers(form, tmp_path, 25)


# Calls that fail


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="LD_PRELOAD and cc"
)
def test_each_call_that_fails_leaves_the_old_or_the_new():
    forms = ("peft", "peft-config", "huggingface")
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, BENCHMARKS / "faults.py", "--errors", "4", "--forms", *forms]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 4 * len(forms)
    for line in lines:
        assert "0 old ones changed" in line or "not allowed" in line
        if "full disks" not in line:
            assert ", 0 torn, 0 orphans after the next save" in line
        outcomes = {*re.findall(r"'([^']+)': \d+", line.split("}: ")[-1].split("}")[0])}
        # where renames fail for good, nothing can be restored: the error says so
        last = {"set aside"} if "all calls" in line else set()
        assert outcomes <= {"CheckpointError", "saved", "in place", *last}


CALLS = ("rename", "replace", "fsync", "mkdir", "open", "link", "unlink", "listdir", "lstat")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("form", ["peft", "peft-config", "huggingface"])
def test_one_failing_call_leaves_the_old_or_the_new(form, number, tmp_path, monkeypatch):
    form, count, failing = FORMS[form], 0, None
    form.save(tmp_path / "old", 1)

    def counted(call, *args, **kwargs):
        nonlocal count
        if threading.current_thread() is threading.main_thread():
            count += 1
            if count == failing:
                raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    outcomes = {"kept": 0, "new": 0, "saved": 0}
    failing, turn = 0, tmp_path / "turn"
    while failing <= count:
        shutil.rmtree(turn, ignore_errors=True)
        shutil.copytree(tmp_path / "old", turn)
        failing, count = failing + 1, 0
        with monkeypatch.context() as patch:
            for name in CALLS:
                call = (lambda handle: None) if name == "fsync" else getattr(os, name)
                replacement = lambda *args, call=call, **kwargs: counted(call, *args, **kwargs)
                patch.setattr(os, name, replacement)
            try:
                form.save(turn, 2)
                said = "saved"
            except CheckpointError as error:
                assert os.strerror(number) in str(error)  # noqa: PT017
                said = "new" if "holds the new" in str(error) else "kept"
                assert said == "new" or "unchanged" in str(error)  # noqa: PT017
        outcomes[said] += 1
        assert form.whole(turn) == (1 if said == "kept" else 2)
        form.save(turn, 3)
        assert form.whole(turn) == 3
        assert form.orphans(turn) == 0
    assert outcomes["kept"] > 5
    assert outcomes["saved"] > 0


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOENT])
@pytest.mark.parametrize("form", FORMS)
def test_a_rename_that_was_done_is_done_whatever_it_reported(form, error, tmp_path, monkeypatch):
    form, replace = FORMS[form], os.replace
    form.save(tmp_path / "x", 1)

    def lying(*args):
        replace(*args)
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lying)
        form.save(tmp_path / "x", 2)
    assert form.whole(tmp_path / "x") == 2
    assert form.orphans(tmp_path / "x") == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
@pytest.mark.parametrize("form", FORMS)
def test_folders_that_cannot_be_flushed_are_written_all_the_same(
    form, number, tmp_path, monkeypatch
):
    form, fsync, on_folders = FORMS[form], os.fsync, True

    def refusing(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) == on_folders:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    form.save(tmp_path / "x", 1)
    form.save(tmp_path / "x", 2)
    assert form.whole(tmp_path / "x") == 2
    assert form.orphans(tmp_path / "x") == 0
    on_folders = False  # a file that cannot be flushed is another matter
    with pytest.raises(CheckpointError, match="unchanged"):
        form.save(tmp_path / "x", 3)
    assert form.whole(tmp_path / "x") == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_parent_that_may_not_be_read(form, tmp_path, monkeypatch):
    real = os.open

    def denied(path, flags, *args, **kwargs):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    FORMS[form].save(tmp_path / "x", 1)
    assert FORMS[form].whole(tmp_path / "x") == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_the_place_of_a_file_is_named(form, tmp_path):
    FORMS[form].save(tmp_path / "x", 1)
    files = [path for path in (tmp_path / "x").iterdir() if path.is_file()]
    for path in files:
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        with pytest.raises(CheckpointError, match=re.escape(str(path.parent))):
            FORMS[form].save(tmp_path / "x", 2)
        path.rmdir()
        path.write_bytes(content)
    assert FORMS[form].whole(tmp_path / "x") == 1


# Standard error

FULL = """
import logging, resource, sys, threading, numpy as np
import lowrank_jax as lowrank
from lowrank_jax import checkpoint
lora = {"w": lowrank.LowRank(np.ones((4000, 2), "f"), np.ones((2, 4000), "f"))}
config = lowrank.LoraConfig(targets="w")
save = lambda path: checkpoint.save(path, lora=lora, config=config)
save(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(sys.argv[1])
except lowrank.CheckpointError as error:
    print("refused", "unchanged" in str(error))
logging.getLogger("absl").error("the user's own")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of resources")
def test_a_full_disk_is_told_once(tmp_path):
    for number in range(2):
        with program(FULL, tmp_path / str(number)) as work:
            out, err = work.communicate()
        assert out == "refused True\n"
        assert err.splitlines() == ["ERROR:absl:the user's own"] or err == "the user's own\n", err


def test_what_others_log_meanwhile_is_logged(caplog):
    log = logging.getLogger("absl")

    def failed(text, error):
        try:
            raise error
        except ValueError:
            log.exception("_SignalingThread.run() raised an exception: %s", text)

    own, other = ValueError("own"), ValueError("other")
    hook = sys.unraisablehook
    with pytest.raises(CheckpointError), _quiet.silence_orbax("arrays-0a"):
        failed("at /x/arrays-0a/d", ValueError("of the same folder"))
        failed("no path", own)
        failed("no path", other)
        log.error("an error of the user's")
        log.info("_SignalingThread without an exception")
        raise CheckpointError("wrapped") from own
    assert [record.getMessage() for record in caplog.records] == [
        "an error of the user's",
        "_SignalingThread.run() raised an exception: no path",
    ]
    assert caplog.records[1].exc_info[1] is other
    assert not log.filters
    with _quiet.silence_orbax("arrays-0b"):
        pass
    assert sys.unraisablehook is hook


# Paths

LONG = {"NUL": "a\0b", "300": "x" * 300, "5000": "x" * 5000, "deep": "x/" * 3000 + "x"}
LONG |= {"surrogate": "a\ud800", "empty": ""}
ENTRIES = {
    "checkpoint.save": lambda p: checkpoint.save(p, lora={"w": NODE}, config=CONFIG),
    "checkpoint.save_async": lambda p: checkpoint.save_async(
        p, lora={"w": NODE}, config=CONFIG
    ).wait(),
    "checkpoint.exists": checkpoint.exists,
    "checkpoint.restore": checkpoint.restore,
    "peft.save": lambda p: peft.save(p, {"q": {"kernel": NODE}}, CONFIG),
    "peft.load": lambda p: peft.load(p, PARAMS),
    "huggingface.save": lambda p: huggingface.save(p, PARAMS),
    "huggingface.save like": lambda p: huggingface.save("/none", PARAMS, like_folder=p),
    "huggingface.load": lambda p: huggingface.load(p, PARAMS),
    "huggingface.load gguf": lambda p: huggingface.load(f"{p}.gguf" if p else p, PARAMS),
    "huggingface.merge base": lambda p: huggingface.merge(p, PEFT, "/none/out"),
    "huggingface.merge adapter": lambda p: huggingface.merge(LLAMA, p, "/none/out"),
    "huggingface.merge folder": lambda p: huggingface.merge(LLAMA, PEFT, p),
    "bitsandbytes.load": lowrank.bitsandbytes.load,
}


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("entry", ENTRIES)
def test_paths_that_no_file_system_has(entry, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        ENTRIES[entry](LONG[case])
    text = str(error.value)
    assert len(text) < 1000
    assert text.isprintable()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("entry", ENTRIES)
def test_links_in_a_circle_are_no_folder(entry, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a" / "below", tmp_path / "a"):
        with pytest.raises(CheckpointError):
            ENTRIES[entry](str(path))


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("command", ["inspect", "merge", "convert"])
def test_the_command_line_says_so_too(command, case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"inspect": [], "merge": [str(PEFT), "out"], "convert": ["out"]}[command]
    assert main([command, LONG[case] or "none", *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lowrank_jax: ")
    assert len(captured.err) < 1000


# Names

HOSTILE = {
    "escape": "a\x1b[2J\x1b]0;title\x07b",
    "line": "a\nodd: EVIL",
    "return": "a\rEVIL",
    "NUL": "a\0b",
    "C1": "a\x9b31mb",
    "DEL": "a\x7fb",
    "bidi": "a\u202eb\u2066c",
    "separator": "a\u2028EVIL",
    "surrogate": "a\ud800b",
    "long": "x" * 100_000,
}
UNFIT = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def fit(text, limit=30_000):
    """Whether a text steers no terminal, makes no line of its own, and is not long."""
    return not UNFIT.search(text) and "\nodd: EVIL" not in text and len(text) < limit


@pytest.mark.parametrize("case", HOSTILE)
def test_printable(case):
    text = to_printable(HOSTILE[case])
    assert fit(text)
    assert "\n" not in text
    assert len(text) < 300
    text.encode()
    assert to_printable(text) == text
    for error in (CheckpointError, lowrank.PlanWarning):
        assert fit(str(error(f"{HOSTILE[case]} is wrong")).replace("\nodd", ""))


@pytest.mark.parametrize(
    "text", ["слой/überß", "层.weight", "👩‍👩‍👧", "क्‍ष", "a b~\\'\"", "לשון", "ﷺ𝔘"]
)
def test_what_is_written_in_the_world_stays(text):
    assert to_printable(text) == text
    assert str(CheckpointError(text)) == text


def header(name, shape=(1,)):
    """A safetensors file of one tensor; JSON keeps what cannot be encoded."""
    entry = (
        f'{{{json.dumps(name)}:{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    )
    return len(entry).to_bytes(8, "little") + entry + bytes(4)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_file_calls_itself_is_escaped(case, encoding, tmp_path, monkeypatch):
    name, shown = HOSTILE[case], []
    adapter = shutil.copytree(PEFT, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(header(name))
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**values, "base_model_name_or_path": name[:5000]})
    )
    wrong = shutil.copytree(PEFT, tmp_path / "wrong")
    (wrong / "adapter_config.json").write_text(json.dumps({**values, "peft_type": name[:5000]}))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(header(name))
    (model / "config.json").write_text(
        json.dumps({"architectures": [name, name], "quantization_config": {"quant_method": name}})
    )
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name}}))
    for arguments in (
        ["inspect", adapter],
        ["inspect", wrong],
        ["inspect", model],
        ["inspect", shards],
        ["merge", model, PEFT, tmp_path / "out"],
        ["merge", LLAMA, adapter, tmp_path / "out"],
        ["convert", adapter, tmp_path / "out"],
    ):
        for stream in ("stdout", "stderr"):
            file = (tmp_path / stream).open("w", encoding=encoding)
            monkeypatch.setattr(sys, stream, file)
        main([*map(str, arguments)])
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        shown += [(tmp_path / s).read_text(encoding=encoding) for s in ("stdout", "stderr")]
        monkeypatch.undo()
    (model / "config.json").unlink()
    for call in (
        lambda: peft.load(adapter, PARAMS),
        lambda: peft.load(wrong, PARAMS),
        lambda: huggingface.load(model, PARAMS),
        lambda: huggingface.load(shards, PARAMS),
        lambda: huggingface.save(tmp_path / "out", PARAMS, like_folder=model),
        lambda: lowrank.bitsandbytes.load(model),
    ):
        with pytest.raises(lowrank.LowrankError) as error:
            call()
        shown.append(str(error.value))
    assert len([text for text in shown if text]) == 13
    for text in shown:
        assert fit(text), ascii(text)[:2000]


@pytest.mark.parametrize("case", HOSTILE)
def test_tables_of_hostile_names(case):
    params = {HOSTILE[case]: jnp.ones((4, 3)), "w": jnp.ones((4, 3))}
    fn = lambda p, x: sum(x @ leaf for leaf in p.values())
    plan = lowrank.plan(fn, params, jnp.ones((2, 4)))
    report = lowrank.report(fn, params, jnp.ones((2, 4)))
    for table in (plan, report):
        for text in (str(table), table._repr_html_()):
            assert fit(text), ascii(text)[:2000]
            assert len(str(table).splitlines()) < 15


TREES = {
    **{case: text for case, text in HOSTILE.items() if case != "long"},
    "parent": "..",
    "here": ".",
    "absolute": "/etc/passwd",
}


@pytest.mark.parametrize("case", TREES)
def test_names_that_torch_has_not_are_not_written(case, tmp_path):
    key = TREES[case]
    params, lora = {key: {"kernel": jnp.ones((4, 3))}}, {key: {"kernel": NODE}}
    for names in (None, lambda path: key if case == "absolute" else f"x.{key}.y"):
        for write in (
            lambda names=names: peft.save(tmp_path / "x", lora, lowrank.LoraConfig(), names=names),
            lambda names=names: huggingface.save(tmp_path / "x", params, names=names),
        ):
            with pytest.raises(CheckpointError, match="would be named") as error:
                write()
            assert fit(str(error.value))
            assert not (tmp_path / "x").exists()
    # a checkpoint keeps every path
    if case != "absolute":
        checkpoint.save(tmp_path / "run", lora=lora, config=CONFIG, opt_state={key: jnp.ones(2)})
        found = checkpoint.restore(tmp_path / "run", like={"lora": lora})
        assert found.lora[key]["kernel"].shape == (4, 3)


@pytest.mark.parametrize("case", ["surrogate", "NUL"])
def test_extras_that_json_cannot_hold(case, tmp_path):
    with contextlib.suppress(lowrank.LowrankError):
        config = lowrank.LoraConfig(extras={"task_type": TREES[case]})
        peft.save(tmp_path / "x", {"q": {"kernel": NODE}}, config)
        assert peft.load(tmp_path / "x", PARAMS)[2].extras["task_type"] == TREES[case]
