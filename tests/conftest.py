"""The numerics all tests run under."""

import os

# eight host devices, before jax is imported: what runs on many devices is tested on every machine
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

# CPU, GPU and TPU multiply float32 in float32: a law about float32 is no law in bfloat16 passes.
jax.config.update("jax_default_matmul_precision", "highest")


# Files whose tests share compiled programs or what a fixture made: each goes to one worker. The
# laws go by model.
TOGETHER = {
    *("test_example_finetune.py", "test_example_loops.py", "test_initializers.py", "test_peft.py"),
    *("test_codecs.py", "test_huggingface.py", "test_functional.py", "test_sharded_llama.py"),
    *("test_readme.py", "test_dora_flops.py"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        group = item.path.name if item.path.name in TOGETHER else None
        if item.path.name == "test_laws.py" and (call := getattr(item, "callspec", None)):
            group = str(next(iter(call.params.values()))).partition(" ")[0]
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def strict_promotion():
    """No operation may mix dtypes unsaid: factors are float32, whatever the model computes in."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def fast_compile():
    """For tests of values and not of speed: XLA's most expensive passes are left out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compile(fast_compile):
    """All of XLA's passes, in a module that uses fast_compile."""
    jax.config.update("jax_disable_most_optimizations", False)
