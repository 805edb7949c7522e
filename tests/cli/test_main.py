"""`python -m lowrank_jax`: what it prints and writes, and how it says no."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_llama import write_gguf

import lowrank_jax as lowrank
from lowrank_jax._cli.main import main
from lowrank_jax._files.safetensors import TensorFile, write_tensors
from lowrank_jax._files.shards import open_folder
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import is_node

GOLDEN = Path(__file__).parents[1] / "golden"
PEFT, MODELS = GOLDEN / "peft_files", GOLDEN / "huggingface"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("fast_compile")


def said(capsys, *arguments):
    """What a command that succeeds prints."""
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def adapter(tmp_path, case="lora", config=None, change=lambda tensors: tensors):
    """A golden adapter, changed."""
    folder = tmp_path / "adapter"
    shutil.copytree(PEFT / case, folder)
    values = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(values))
    with TensorFile(folder / TENSORS) as file:
        tensors = change({name: file.read(name) for name in file.entries})
    with open(folder / TENSORS, "wb") as file:
        write_tensors(file, tensors)
    return folder


def run(tmp_path):
    """A checkpoint."""
    params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 32, 48))}}}}
    node = lowrank.LowRank(
        jnp.ones((2, 32, 3)), jnp.full((2, 3, 48), 0.5), None, (1,), (2,), (0,), 5 / 3
    )
    lora = {"layers": {"mlp": {"up_proj": {"kernel": node}}}}
    config = lowrank.LoraConfig(rank=3, alpha=5, targets="**/kernel")
    lowrank.checkpoint.save(tmp_path / "run", lora=lora, config=config, base=params, step=7)
    return tmp_path / "run"


# inspect

FOLDERS = {
    PEFT / "rslora-patterns": """a PEFT adapter
base model: not named
28 tensors, 1,712 numbers (float32 1,712), 6,848 bytes
adapted weights: 14, 4 of rank 1, scale 5; 1 of rank 2, scale 2.12132; 6 of rank 2, scale 3.53553; \
2 of rank 2, scale 6.36396; 1 of rank 3, scale 2.88675
""",
    PEFT / "saved": """a PEFT adapter
base model: not named
9 tensors, 4,448 numbers (float32 4,448), 17,792 bytes
adapted weights: 2, 2 of rank 2, scale 1.5
other modules saved: 5, lm_head, model.embed_tokens, model.layers.0.input_layernorm, \
model.layers.1.input_layernorm, model.norm
""",
    MODELS / "llama": """a dense model: LlamaForCausalLM
35 tensors, 20,064 numbers (float32 20,064), 80,256 bytes
3 files
also in the folder: generation_config.json
""",
    MODELS / "tied": """a dense model: LlamaForCausalLM
34 tensors, 18,016 numbers (bfloat16 18,016), 36,032 bytes
1 file
also in the folder: generation_config.json
""",
    GOLDEN / "bitsandbytes_files" / "llama": """a model quantized by bitsandbytes: LlamaForCausalLM
105 tensors, 53,712 numbers (uint8 40,354, float32 13,358), 93,786 bytes
2 files
also in the folder: generation_config.json
""",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_inspect_says_what_a_folder_is(folder, capsys):
    assert said(capsys, "inspect", folder) == FOLDERS[folder]


def test_inspect_knows_a_checkpoint(tmp_path, capsys):
    text = said(capsys, "inspect", run(tmp_path))
    assert text == (
        "a checkpoint of lowrank_jax, step 7, without an optimizer\n"
        f"base: {lowrank.checkpoint.restore(tmp_path / 'run').fingerprint!r}\n"
        "2 tensors, 480 numbers (float32 480), 1,920 bytes\n"
        "adapted weights: 1, 1 of rank 3, scale 1.66667\n"
    )


def test_inspect_counts_quantized_factors(tmp_path, capsys):
    """64 x 2 and 2 x 128 parameters: a byte for two codes, and a float32 for 32 of them."""
    lora = {"w": lowrank.LowRank(jnp.ones((64, 2)), jnp.ones((2, 128)))}
    quant = lowrank.QuantConfig(targets="w", block_size=32, double_quant=False)
    stored, config = lowrank.quantize_adapter(lora, quant), lowrank.LoraConfig(rank=2, targets="w")
    lowrank.checkpoint.save(tmp_path, lora=stored, config=config)
    text = said(capsys, "inspect", tmp_path)
    assert "quantized factors: 2 in nf4, 384 parameters in 240 bytes" in text
    assert "4 tensors, 396 numbers (uint4 384, float32 12)" in text
    broken = dataclasses.replace(stored["w"].a, scales=jnp.full_like(stored["w"].a.scales, jnp.nan))
    lora = {"w": dataclasses.replace(stored["w"], a=broken)}
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config)
    assert "odd: w: not finite" in said(capsys, "inspect", tmp_path)


def test_inspect_says_what_is_odd(tmp_path, capsys):
    def change(tensors):
        first, second, third, fourth = [key for key in tensors if "lora_B" in key][:4]
        tensors[first] = np.zeros_like(tensors[first])
        tensors[second] = np.full_like(tensors[second], np.inf)
        del tensors[third]
        tensors[fourth.replace("lora_B", "other.lora_B")] = tensors[fourth][:, :1]
        tensors[fourth.replace("lora_B", "other.lora_A")] = tensors[fourth][:1]
        tensors["stray"] = np.ones(1, np.float32)
        return tensors

    config = {"base_model_name_or_path": "some/llama", "use_dora": False}
    text = said(capsys, "inspect", adapter(tmp_path, "lora", config, change))
    assert "base model: some/llama\n" in text
    odd = [line for line in text.splitlines() if line.startswith("odd: ")]
    assert len(odd) == 5
    for words in (
        "stray: no key of an adapter",
        "a factor is 0, so that it changes nothing",
        "lora_B.weight: not finite",
        "has one of lora_A.weight and lora_B.weight",
        f"other: rank 1, and {CONFIG} says 2",
    ):
        assert len([line for line in odd if words in line]) == 1, words

    folder = tmp_path / "model"
    shutil.copytree(MODELS / "llama", folder)
    (folder / "config.json").unlink()
    shutil.copy(MODELS / "tied" / "model.safetensors", folder / "model.safetensors")
    odd = said(capsys, "inspect", folder)
    assert "odd: there is no config.json" in odd
    assert "odd: there are both model.safetensors.index.json and model.safetensors" in odd
    assert "odd: model-00001-of-00003.safetensors: of no file of this model" in odd


def test_inspect_takes_files(tmp_path, capsys):
    text = said(capsys, "inspect", PEFT / "lora" / TENSORS)
    assert text.startswith("a safetensors file\n28 tensors, 1,856 numbers (float32 1,856), 7,424")
    assert "layers.0.mlp.down_proj.lora_A.weight [2, 48], " in text
    assert text.endswith(" and 25 more\n")
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    text = said(capsys, "inspect", tmp_path / "tiny.gguf")
    assert re.fullmatch(
        r"a GGUF file of llama: \w+\n\d+ tensors, [\d,]+ numbers \(F32 [\d,]+.*\), [\d,]+ bytes\n",
        text,
    )


def test_inspect_names_everything_in_a_folder(tmp_path, capsys):
    folder = adapter(tmp_path)
    run(folder)  # a checkpoint, in a folder of its own
    shutil.copytree(folder / "run", folder, dirs_exist_ok=True)
    shutil.copy(MODELS / "tied" / "model.safetensors", folder / "extra.safetensors")
    (folder / "notes.txt").touch()
    lines = said(capsys, "inspect", folder).splitlines()
    assert lines[0] == "a PEFT adapter"
    assert lines[4] == "a checkpoint of lowrank_jax, step 7, without an optimizer"
    assert lines[8:10] == ["extra.safetensors:", "a safetensors file"]
    assert lines[-1] == "also in the folder: notes.txt, run/ (a checkpoint of lowrank_jax)"


def test_lines_of_a_terminal_are_broken_between_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    plain = FOLDERS[PEFT / "saved"]
    text = said(capsys, "inspect", PEFT / "saved")
    assert text != plain
    assert text.split() == plain.split()
    assert max(map(len, text.splitlines())) <= 80


# merge and convert


def test_convert_names_the_base_model_and_finds_the_table(tmp_path, capsys):
    out = tmp_path / "peft"
    text = said(capsys, "convert", run(tmp_path), out, "--base-model", "some/llama")
    assert "named by --names llama, such as model.layers.0.mlp.up_proj\n" in text
    assert "base model: some/llama\n" in text
    assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == "some/llama"
    assert "base model: some/llama\n" in said(capsys, "inspect", out)


def test_merge_finds_the_table_in_the_base(tmp_path, capsys):
    text = said(capsys, "merge", MODELS / "llama", run(tmp_path), tmp_path / "out")
    assert text.endswith("modules named by --names llama\n")
    said(capsys, "merge", MODELS / "llama", tmp_path / "run", tmp_path / "two", "--names", "llama")
    with open_folder(tmp_path / "out") as one, open_folder(tmp_path / "two") as two:
        chex.assert_trees_all_equal(dict(one), dict(two))


def test_merge_is_that_of_the_library(tmp_path, capsys):
    text = said(capsys, "merge", MODELS / "llama", PEFT / "dora", tmp_path / "out")
    assert text.startswith(f"{tmp_path}/out: 14 tensors of {MODELS}/llama changed by ")
    lowrank.huggingface.merge(MODELS / "llama", PEFT / "dora", tmp_path / "again")
    with open_folder(tmp_path / "out") as out, open_folder(tmp_path / "again") as again:
        chex.assert_trees_all_equal(dict(out), dict(again))


def test_merge_of_a_checkpoint(tmp_path, capsys):
    said(capsys, "merge", MODELS / "llama", run(tmp_path), tmp_path / "out", "--names", "llama")
    with open_folder(MODELS / "llama") as old, open_folder(tmp_path / "out") as new:
        for key in old:
            expected = old[key] + (2.5 if key.endswith("up_proj.weight") else 0)  # 5/3 * 3 * 0.5
            np.testing.assert_allclose(new[key], expected, atol=1e-6)


def test_convert_there_and_back(tmp_path, capsys):
    out = tmp_path / "peft"
    text = said(capsys, "convert", run(tmp_path), out, "--names", "llama")
    assert text == (
        f"{out}: a PEFT adapter, made of {tmp_path}/run\n"
        "modules named by --names llama, such as model.layers.0.mlp.up_proj\n"
        "base model: not named (--base-model NAME, which AutoPeftModel needs)\n"
    )
    assert json.loads((out / CONFIG).read_text())["lora_alpha"] == 5
    assert "of rank 3, scale 1.66667" in said(capsys, "inspect", out)
    text = said(capsys, "convert", out, tmp_path / "back")
    assert text == f"{tmp_path}/back: a checkpoint of lowrank_jax, made of {out}\n"
    lora = dict(flatten(lowrank.checkpoint.restore(tmp_path / "back").lora, is_leaf=is_node)[0])
    assert sorted(lora) == [f"model/layers/{i}/mlp/up_proj/kernel" for i in range(2)]
    node = lora["model/layers/1/mlp/up_proj/kernel"]
    assert (node.a.shape, node.b.shape, node.scale) == ((32, 3), (3, 48), 5 / 3)
    said(capsys, "convert", tmp_path / "back", tmp_path / "again")
    with TensorFile(out / TENSORS) as one, TensorFile(tmp_path / "again" / TENSORS) as two:
        assert one.entries == two.entries
        for key in one.entries:
            np.testing.assert_array_equal(one.read(key), two.read(key))


@pytest.mark.parametrize("case", ["embeddings-dora", "saved", "bias-all", "rslora-patterns"])
def test_converted_twice_it_merges_to_the_same(case, tmp_path, capsys):
    said(capsys, "convert", PEFT / case, tmp_path / "run")
    said(capsys, "convert", tmp_path / "run", tmp_path / "peft")
    for name, folder in (("one", PEFT / case), ("two", tmp_path / "peft")):
        said(capsys, "merge", MODELS / "llama", folder, tmp_path / name)
    with open_folder(tmp_path / "one") as one, open_folder(tmp_path / "two") as two:
        chex.assert_trees_all_close(dict(one), dict(two), atol=1e-6, rtol=0)


# Mistakes


def odd_run(folder):
    """A checkpoint whose leaves no table names."""
    node = lowrank.LowRank(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 4)), None, (1,), (2,), (0,))
    config = lowrank.LoraConfig(rank=1, targets="**/kernel")
    lowrank.checkpoint.save(folder / "odd", lora={"body": {"kernel": node}}, config=config)
    return folder / "odd"


def pickled(folder):
    (folder / "pytorch_model.bin").touch()
    return folder


MISTAKES = {
    "nothing there": (lambda p: ["inspect", p / "none"], r"none does not exist: pass a folder or"),
    "nothing known": (lambda p: ["inspect", p], r"not an adapter, checkpoint or model"),
    "a pickle": (
        lambda p: ["inspect", pickled(p)],
        r"pytorch_model\.bin is a pickle, and nothing here unpickles",
    ),
    "no model": (
        lambda p: ["merge", p / "none", PEFT / "lora", p / "out"],
        r"none is not a folder: pass the folder of a model",
    ),
    "no model is said before what is wrong with the adapter": (
        lambda p: ["merge", p / "none", odd_run(p), p / "out"],
        r"none is not a folder",
    ),
    "stacked layers that no table names": (
        lambda p: ["convert", odd_run(p), p / "out"],
        r"'body/kernel' stacks layers.*--names TABLE, one of bert, gemma, gemma2, gpt2, llama",
    ),
    "convert into a checkpoint": (
        lambda p: ["convert", PEFT / "lora", adapter(p)],
        r"adapter holds a PEFT adapter, and a checkpoint .* beside it .* another folder",
    ),
    "a file of another kind": (
        lambda p: ["inspect", pickled(p) / "pytorch_model.bin"],
        r"not a folder, a \.gguf or a \.safetensors file; it is a pickle",
    ),
    "no adapter": (
        lambda p: ["merge", MODELS / "llama", p, p / "out"],
        r"holds no adapter_config\.json",
    ),
    "the output is an input": (
        lambda p: ["merge", MODELS / "llama", PEFT / "lora", MODELS / "llama"],
        r"pass another folder to write to",
    ),
    "another adapter": (
        lambda p: ["merge", MODELS / "llama", PEFT / "gpt2", p / "out"],
        r"(?s)c_attn\.lora_A\.weight: unexpected",
    ),
    "names of a PEFT adapter that is merged": (
        lambda p: ["merge", MODELS / "llama", PEFT / "lora", p / "out", "--names", "llama"],
        r"names is for a checkpoint's leaves",
    ),
    "names of a PEFT adapter": (
        lambda p: ["convert", PEFT / "lora", p / "out", "--names", "llama"],
        r"names is for a checkpoint's leaves",
    ),
    "a convolution": (
        lambda p: ["convert", PEFT / "conv", p / "out"],
        r"factors of a convolution",
    ),
    "rows of a table": (
        lambda p: ["convert", PEFT / "tokens", p / "out"],
        r"(?s)trainable_tokens_delta: unexpected",
    ),
    "convert what": (lambda p: ["convert", p, p / "out"], r"neither a checkpoint nor adapter_conf"),
    "convert onto itself": (
        lambda p: ["convert", PEFT / "lora", PEFT / "lora"],
        r"is the folder to read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_have_status_1_and_no_traceback(mistake, tmp_path, capsys):
    make, words = MISTAKES[mistake]
    arguments = make(tmp_path)
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lowrank_jax: ")
    assert "Traceback" not in captured.err
    with pytest.raises(lowrank.CheckpointError, match=words):
        raise lowrank.CheckpointError(captured.err)
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_is_named(capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", "a", "b", "--names", "lama"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "'lama' is not one of bert, gemma, " in error
    assert {"llama", "gpt2", "vit", "paths"} <= {*re.findall(r"\w+", error)}


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"lowrank_jax {lowrank.__version__} (JAX ")


def test_the_module_runs():
    environment = {"PYTHONPATH": str(Path(lowrank.__file__).parents[1]), "PATH": ""}
    command = [sys.executable, "-m", "lowrank_jax", "inspect"]
    good = subprocess.run(
        [*command, PEFT / "lora"], capture_output=True, text=True, env=environment
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("a PEFT adapter\n")
    bad = subprocess.run([*command, "/none"], capture_output=True, text=True, env=environment)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "lowrank_jax: /none does not exist: pass a folder or a file\n"
