"""cdb_jax: stochastic regularisation of the backward pass for JAX."""

import importlib
from typing import Any

from cdb_jax import presets as presets
from cdb_jax._skipping.api import grad as grad, value_and_grad as value_and_grad
from cdb_jax.backdrop import backdrop as backdrop
from cdb_jax.channels import (
    Axes as Axes,
    input_channels as input_channels,
    output_channels as output_channels,
)
from cdb_jax.compact import CompactState as CompactState, compact as compact
from cdb_jax.count import selection_count as selection_count
from cdb_jax.drop_backward import drop_backward as drop_backward
from cdb_jax.drop_backward_scan import drop_backward_scan as drop_backward_scan
from cdb_jax.drop_path_subset import drop_path_subset as drop_path_subset
from cdb_jax.drop_rates import (
    branch_sensitivities as branch_sensitivities,
    drop_backward_sensitivities as drop_backward_sensitivities,
    drop_path_rates as drop_path_rates,
    kept_branches as kept_branches,
)
from cdb_jax.freezing import (
    FreezeDroppedState as FreezeDroppedState,
    freeze_dropped as freeze_dropped,
)
from cdb_jax.inference import infer_channel_axes as infer_channel_axes
from cdb_jax.policy import Policy as Policy
from cdb_jax.report import channel_report as channel_report
from cdb_jax.selection import Mode as Mode, Selection as Selection
from cdb_jax.stochastic_depth import drop_branch as drop_branch, drop_path as drop_path
from cdb_jax.transform import (
    ChannelDropBackState as ChannelDropBackState,
    channel_drop_back as channel_drop_back,
)
from cdb_jax.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    """Imports `cdb_jax.nnx` and `cdb_jax.linen`, which need Flax, when they are first used."""
    if name in ("nnx", "linen"):
        return importlib.import_module(f"cdb_jax.{name}")
    raise AttributeError(f"module 'cdb_jax' has no attribute {name!r}")
