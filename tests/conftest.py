"""Strict numerics and eight CPU devices, so that what passes here holds anywhere."""

import importlib.metadata
import os

# Eight devices; and machine code that is quick to make, as most of the time goes into that.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Halves the time to compile. JAX 0.12 does not know the flag, and stops at it.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def standard_promotion():
    """For tests that run other libraries' code, which promotes dtypes as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def mistakes_in_rules_are_errors(monkeypatch):
    """For users, an equation that a rule does not understand is one that is not skipped."""
    monkeypatch.setattr("cdb_jax._skipping.follow.FORM_ERRORS", ())


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the examples keep their data sets."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def compilation_cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compilation_cache(compilation_cache_dir, monkeypatch):
    """For tests of training runs: most compile what another one has compiled before."""
    settings = {
        "jax_compilation_cache_dir": str(compilation_cache_dir),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        monkeypatch.setenv(name.upper(), str(value))  # For the processes that a test starts.
    yield
    for name, value in before.items():
        jax.config.update(name, value)
