"""Draws channels.png: which channels of one layer learn, step by step.

python docs/channels.py
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

import cdb_jax

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.style.use(Path(__file__).parents[1] / "examples/figures.mplstyle")
STEPS, CHANNELS = 48, 24
PANELS = {
    'channel_choice="bernoulli"': dict(),
    'channel_choice="exact"': dict(channel_choice="exact"),
    'channel_choice="window"': dict(channel_choice="window"),
    "layer_rate=0.5": dict(layer_rate=0.5),
}

kernel = {"dense": {"kernel": jnp.zeros((8, CHANNELS))}}
figure, axes = pyplot.subplots(2, 2, figsize=(10, 4.6), sharex=True, sharey=True)
for panel, (title, settings) in zip(axes.flat, PANELS.items(), strict=True):
    policy = cdb_jax.Policy(0.5, key=0, **settings)
    learns = [
        np.asarray(policy.select(kernel, step).factors["dense/kernel"]) > 0 for step in range(STEPS)
    ]
    panel.pcolormesh(
        np.transpose(learns), cmap="Blues", vmin=-0.15, vmax=1.4, edgecolors="w", linewidth=0.5
    )
    panel.set_title(title, family="monospace", fontsize=10)
for panel in axes[-1]:
    panel.set_xlabel("step")
for panel in axes[:, 0]:
    panel.set_ylabel("output channel")
figure.suptitle("Dark channels receive a gradient in a step, light ones do not (rate 0.5)")
figure.savefig(Path(__file__).with_suffix(".png"))
