"""Strict numerics and eight CPU devices, so that what passes here holds anywhere."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

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
