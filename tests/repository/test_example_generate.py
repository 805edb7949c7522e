"""The chat of the examples: base against adapter, from a checkpoint or PEFT's folder."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_llama import write_gguf

pytest.importorskip("rich")
pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

import frozen
import generate
import llama
import sampling
import smollm2
import texts

import lowrank_jax as lowrank
from lowrank_jax._cli.main import main as command_line

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = lowrank.LoraConfig(rank=2, targets=("**/q_proj/kernel", "**/up_proj/kernel"))
QUESTION = "the end"
GREEDY = [f"--prompt={QUESTION}", "--greedy", "--tokens=12"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path)
    return path


def moved(lora):
    """The adapter, as far from its start as training might bring it."""
    leaves, treedef = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [x + n for x, n in zip(leaves, noise, strict=True)])


def plan_of(pretrained):
    apply = llama.Llama(pretrained.config).apply
    return lowrank.plan(apply, pretrained.variables, jnp.zeros((1, 2), jnp.int32))


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """The folder of an adapter for the tiny model."""
    pretrained = smollm2.load(tiny)
    key, params = jax.random.key(0), pretrained.variables
    base, lora = lowrank.init(key, params, CONFIG, plan=plan_of(pretrained))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    lowrank.checkpoint.save(folder, lora=moved(lora), config=CONFIG, base=base)
    return folder


def chat(capsys, *arguments) -> dict[str, str]:
    """What base and adapter answer."""
    assert generate.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.split("|", 1) for line in captured.out.splitlines() if "|" in line]
    return {name.strip(): text.strip() for name, text in lines if name.strip() in generate.SCALES}


def likeliest(pretrained, variables, prompt) -> str:
    """The likeliest answer of a model with dense variables, on one line."""
    own = len(pretrained.tokenizer.encode(prompt).ids)
    (text,) = sampling.generate(
        llama.Llama(pretrained.config),
        variables,
        pretrained.tokenizer,
        [prompt],
        length=own + 12,
        key=jax.random.key(0),
        stop=pretrained.stop,
    )
    return " ".join(text.split())


@pytest.mark.parametrize("raw", [False, True])
def test_base_and_adapter_answer_as_themselves(tiny, adapter, capsys, raw):
    flags = ["--adapter", adapter, "--model", tiny, *GREEDY, *(["--raw"] if raw else [])]
    answers = chat(capsys, *flags)
    pretrained = smollm2.load(tiny)
    params, lora = pretrained.variables, lowrank.checkpoint.restore(adapter).lora
    prompt = QUESTION if raw else generate.QUESTION.format(QUESTION)
    merged = lowrank.merge(params, lowrank.checkpoint.restore(adapter, base=params).lora)
    assert jax.tree.leaves(lora)
    assert answers["base"] == likeliest(pretrained, params, prompt)
    assert answers["adapter"] == likeliest(pretrained, merged, prompt)
    assert answers["base"] != answers["adapter"]


def test_a_converted_adapter_answers_the_same(tiny, adapter, tmp_path, capsys):
    flags = ["--model", tiny, *GREEDY]
    expected = chat(capsys, "--adapter", adapter, *flags)
    arguments = ["convert", adapter, tmp_path / "peft-folder", "--base-model", "some/name"]
    assert command_line([str(argument) for argument in arguments]) == 0
    assert "--names llama" in capsys.readouterr().out
    assert chat(capsys, "--adapter", tmp_path / "peft-folder", *flags) == expected


@pytest.mark.parametrize("how", ["zero", pytest.param("loftq", marks=pytest.mark.slow)])
def test_a_quantized_base_is_made_anew(tiny, tmp_path, capsys, how):
    pretrained = smollm2.load(tiny)
    model, key = llama.Llama(pretrained.config), jax.random.key(7)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The end of the matter {i}." for i in range(200)))
    train = texts.windows(pretrained.tokenizer, texts.read_text(text)[0], 16)
    seen = frozen.loftq_windows(train, 2, 7)
    plan = plan_of(pretrained)
    params = jax.tree.map(jnp.copy, pretrained.variables)
    base, lora = frozen.start(key, model.apply, params, CONFIG, plan, "nf4", how, seen)
    numbers = {"seed": 7, "batch": 2, "length": 16}
    extra = numbers | {"quantize": 1, "start": generate.flags.STARTS.index(how)}
    folder = tmp_path / "adapter"
    lowrank.checkpoint.save(folder, lora=lora, config=CONFIG, base=base, extra=extra)
    flags = ["--adapter", folder, "--model", tiny, "--text", text, *GREEDY]
    answers = chat(capsys, *flags)
    merged = lowrank.merge(base, lora)
    prompt = generate.QUESTION.format(QUESTION)
    assert answers["adapter"] == likeliest(pretrained, merged, prompt)


def test_prompts_are_read_from_the_input(tiny, adapter, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION}\n"))
    assert generate.main([f"--adapter={adapter}", f"--model={tiny}", *GREEDY[1:]]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[:3] == lines[3:]
    assert len(lines) == 6


def test_mistakes_are_one_line(tiny, tmp_path, capsys):
    cases = {
        ("--adapter=absent",): "--adapter absent is not a folder: pass the --out of finetune.py",
        (f"--adapter={tmp_path}",): "holds no adapter_config.json",
        (): "the following arguments are required: --adapter (--help lists the flags)",
    }
    for arguments, words in cases.items():
        assert generate.main([*arguments, f"--model={tiny}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


def test_sampling_is_of_the_seed(tiny, adapter, capsys):
    flags = ["--adapter", adapter, "--model", tiny, f"--prompt={QUESTION}", "--tokens=12"]
    one, again, other = (chat(capsys, *flags, f"--seed={seed}") for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert np.all([name in one for name in generate.SCALES])
