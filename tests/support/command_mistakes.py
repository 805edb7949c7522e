"""Mistakes on the command line and in the flags of the examples, and the line each prints."""

import contextlib
import importlib
import io
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp

import lowrank_jax as lowrank

PROGRAMS = {
    "python -m lowrank_jax": "lowrank_jax._cli.main",
    "python examples/finetune.py": "finetune",
    "python examples/generate.py": "generate",
}
INSPECT, FINETUNE, GENERATE = PROGRAMS


def saved(kind):
    """A folder of a small adapter, of this library ("adapter") or of PEFT ("peft-folder")."""
    config = lowrank.LoraConfig(rank=2, targets="**/kernel")
    lora = {"head": {"kernel": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=2.0)}}
    if kind == "adapter":
        lowrank.checkpoint.save(kind, lora=lora, config=config)
    else:
        lowrank.peft.save(kind, lora, config)
    return kind


def stacked():
    """A folder of an adapter whose leaf stacks layers, with a name that is in no table."""
    node = lowrank.LowRank(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 4)), None, (1,), (2,), (0,))
    config = lowrank.LoraConfig(rank=1, targets="**/kernel")
    lowrank.checkpoint.save("adapter", lora={"body": {"kernel": node}}, config=config)
    return "adapter"


def both_kinds():
    """The arguments that would write a PEFT adapter into the folder of a checkpoint."""
    Path("mine").mkdir()
    Path("mine/manifest.json").touch()
    return ["convert", saved("adapter"), "mine"]


def model_file(name, content=b"GGUF\3\0\0\0"):
    Path(name).write_bytes(content)
    return f"--model={name}"


def tiny_model():
    importlib.import_module("gguf_llama").write_gguf(Path("tiny.gguf"))
    return "--model=tiny.gguf"


def other_folder():
    Path("adapter").mkdir()
    Path("adapter/notes.txt").touch()
    return "--out=adapter"


def no_cache():
    Path("file").touch()
    os.environ["XDG_CACHE_HOME"] = "file"
    return []


# name -> (program, its arguments, words of the line it prints)
COMMANDS = {
    "inspecting what is not there": (
        INSPECT,
        lambda: ["inspect", "absent"],
        r"absent does not exist: pass a folder or a file",
    ),
    "merging into a base that is not there": (
        INSPECT,
        lambda: ["merge", "absent", stacked(), "merged"],
        r"absent is not a folder: pass the folder of a model, with its config.json",
    ),
    "converting stacked layers that no table names": (
        INSPECT,
        lambda: ["convert", stacked(), "peft-folder"],
        r"'body/kernel' stacks layers, .* pass --names TABLE, one of bert, gemma, gemma2, gpt2, ll",
    ),
    "converting into a folder of the other kind": (
        INSPECT,
        both_kinds,
        r"mine holds a checkpoint of lowrank_jax, and a PEFT adapter beside it would be a mixture",
    ),
    "a GGUF file that is cut short": (
        FINETUNE,
        lambda: [model_file("model.gguf")],
        r"--model model.gguf is a GGUF file that is cut short or damaged: fetch it again",
    ),
    "a safetensors file for --model": (
        FINETUNE,
        lambda: [model_file("model.safetensors", b"\x80\0\0\0\0\0\0\0{")],
        r"--model model.safetensors is a safetensors file, not a GGUF file: .*convert_hf_to_gguf",
    ),
    "a folder for --model": (
        FINETUNE,
        lambda: [f"--model={saved('peft-folder')}"],
        r"--model peft-folder is a folder, not a GGUF file: .*convert_hf_to_gguf",
    ),
    "a cache that cannot be made": (
        FINETUNE,
        no_cache,
        r"file/lowrank_jax cannot be made .*: set XDG_CACHE_HOME .*--model",
    ),
    "--rank too large": (
        FINETUNE,
        lambda: [tiny_model(), "--targets=q_proj", "--rank=64", "--batch=1", "--length=16"],
        r"--rank 64 is more than a layer of --targets can have: pass --rank 32 or less, or --targ",
    ),
    "--out with something else in it": (
        FINETUNE,
        lambda: [other_folder()],
        r"--out adapter holds something else than a run of this job \(notes.txt\): .*--replace",
    ),
    "a chat without an adapter": (
        GENERATE,
        lambda: ["--adapter=absent"],
        r"--adapter absent is not a folder: pass the --out of finetune.py, which makes one",
    ),
}


@contextlib.contextmanager
def empty_folder():
    """Works in a new folder, with the environment that there was afterwards."""
    environment = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)


def run_command(name):
    """The exit status of a mistaken command, what it printed, and the command as it is typed."""
    program, make, _ = COMMANDS[name]
    main = importlib.import_module(PROGRAMS[program]).main
    with empty_folder(), contextlib.redirect_stderr(io.StringIO()) as stderr:
        arguments = make()
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(arguments)
    return status, stderr.getvalue(), " ".join([program, *arguments])
