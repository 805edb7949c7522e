"""The numerics all tests run under."""

import os
from importlib import metadata

import pytest

# eight host devices, before jax is imported: what runs on many devices is tested on every machine.
# In jaxlib 0.10 its older emitters too, which compile in half the time; one without them does not
# start.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)

# each worker on cores of its own: XLA's compilers take a fifth more time where they share them
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = sorted(os.sched_getaffinity(0))[worker::workers]
    os.sched_setaffinity(0, own or os.sched_getaffinity(0))

import jax

# helpers that assert
pytest.register_assert_rewrite(
    "checkpoints", "codec_reference", "guides", "initializer_methods", "peft_files", "small_weights"
)

# CPU, GPU and TPU multiply float32 in float32: an invariant of float32 does not hold in bfloat16.
jax.config.update("jax_default_matmul_precision", "highest")


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
