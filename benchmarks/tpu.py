"""TPUs that are not there: what their compiler must be told, and how their chips are arranged.

Import it before anything runs; `libtpu` must be installed, in an environment of its own.
"""

import os
from typing import Any

import jax
from jax.experimental import topologies

# The compiler asks the machine for a TPU unless it is told about one.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
jax.config.update("jax_platforms", "cpu")


def chips(topology: str) -> Any:
    """The chips of a TPU v5e slice such as "2x4", to compile for."""
    return topologies.get_topology_desc(f"v5e:{topology}", "tpu").devices
