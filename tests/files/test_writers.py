"""Writers under attack: links, rival writers, failing calls, hostile names and paths."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError, checkpoint, huggingface, peft
from lowrank_jax._cli import main

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA, PEFT = GOLDEN / "huggingface" / "llama", GOLDEN / "peft_files" / "lora"

NODE = lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
PARAMS = {"q": {"kernel": jnp.ones((4, 3))}}
CONFIG = lowrank.LoraConfig(rank=2, targets="**/kernel")


def copied(tmp_path):
    """A model's folder of the tests' own."""
    return shutil.copytree(LLAMA, tmp_path / "base")


def merged(base, tmp_path):
    return huggingface.merge(base, PEFT, tmp_path / "out")


# Links


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
