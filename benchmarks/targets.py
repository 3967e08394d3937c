"""Accelerators that are not there: how to compile for them, and what they can do.

Import it before anything runs. It needs an environment of its own, as `import jax` looks for a TPU
where `libtpu` is installed:

    python -m venv accelerators && accelerators/bin/pip install jax==0.10.2 flax optax libtpu
    accelerators/bin/pip install jax-cuda12-plugin==0.10.2     # 1.3 GB; for GPUs
"""

import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# The compilers ask the machine for a device unless they are told about one.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
jax.config.update("jax_platforms", "cpu")


class Chip(NamedTuple):
    """What a chip is said to do at best.

    Attributes:
      name: the product.
      flops: of matrix units in bfloat16, a second.
      bandwidth: of its memory, bytes a second.
      launch: seconds from one kernel to the next.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float


CHIPS = {
    "h100": Chip("NVIDIA H100 SXM", 989e12, 3.35e12, 2e-6),
    "v5e": Chip("TPU v5e", 197e12, 0.82e12, 0.0),
}
# What the compiler asks of an H100 (a GpuTargetConfigProto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def chips(target: str) -> Any:
    """The chips of a target such as "v5e:2x4" or "h100:8", to compile for."""
    kind, _, size = target.partition(":")
    if kind == "v5e":
        return topologies.get_topology_desc(f"v5e:{size}", "tpu").devices
    # Triton's products are tuned on the GPU, which is not there.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
    )
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=f"1x1x{size}", target_config=H100
    )
    return found.devices
