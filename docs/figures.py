"""Draws the pictures of methods.md and skipping.md, each from the library itself.

python docs/figures.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import cdb_jax

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).parent
pyplot.style.use(HERE.parent / "examples/figures.mplstyle")
KEYS = (0, 3, 1)  # With the last of them one image is dropped.


def save(figure: pyplot.Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png")
    pyplot.close(figure)


def freezing() -> None:
    """One weight under Adam, whose channel is dropped in the shaded steps."""
    policy = cdb_jax.Policy(0.5, key=5, channel_choice="exact")
    params, steps = {"kernel": jnp.zeros((1, 2))}, 24
    drop, adam = cdb_jax.channel_drop_back(policy), optax.adam(0.1)
    kinds = {
        "before the optimizer": optax.chain(drop, adam),
        "after the optimizer": optax.chain(adam, drop),
        "freeze_dropped": cdb_jax.freeze_dropped(adam, policy),
    }
    gradient = {"kernel": jnp.full((1, 2), -1.0)}
    figure, (weight, moment) = pyplot.subplots(1, 2, figsize=(10, 3))
    for title, tx in kinds.items():
        now, state = params, tx.init(params)
        weights, moments = [0.0], [0.0]
        for _ in range(steps):
            updates, state = tx.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
            weights.append(float(now["kernel"][0, 0]))
            moments.append(float(optax.tree.get(state, "mu")["kernel"][0, 0]))
        weight.plot(weights, ".-", label=title, linewidth=1)
        moment.plot(moments, ".-", label=title, linewidth=1)
    for step in range(steps):
        if policy.select(params, step).factors["kernel"][0] == 0:
            weight.axvspan(step, step + 1, color="0.9")
            moment.axvspan(step, step + 1, color="0.9")
    weight.set(xlabel="step", ylabel="weight", title="a weight (shaded: its channel is dropped)")
    moment.set(xlabel="step", ylabel="first moment", title="its first moment in Adam")
    weight.legend()
    save(figure, "freezing")


def backdrop() -> None:
    """What the gradient of two images is multiplied by."""
    kinds = {
        "axes=(1, 2)": dict(axes=(1, 2)),
        "axes=(1, 2), sample_axes=0": dict(axes=(1, 2), sample_axes=0),
        "axes=0": dict(axes=0),
    }
    figure, panels = pyplot.subplots(2, 3, figsize=(8, 5))
    for column, (title, settings) in enumerate(kinds.items()):
        x, key = jnp.ones((2, 12, 12, 1)), jax.random.key(KEYS[column])
        settings = settings | {"key": key}
        mask = jax.grad(lambda x, given=settings: cdb_jax.backdrop(x, 0.5, **given).sum())(x)
        for row in range(2):
            shown = panels[row, column].imshow(mask[row, ..., 0], cmap="Blues", vmin=0, vmax=2.2)
            panels[row, column].set(xticks=[], yticks=[])
        panels[0, column].set_title(title, family="monospace", fontsize=9)
    panels[0, 0].set_ylabel("image 0")
    panels[1, 0].set_ylabel("image 1")
    figure.colorbar(shown, ax=panels, shrink=0.8, label="factor on the gradient")
    save(figure, "backdrop")


def stochastic_depth() -> None:
    """Drop rates of twelve branches under two budgets."""
    sensitivities = 1.0 / np.arange(1, 13) + np.where(np.arange(12) == 8, 0.4, 0.0)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3), sharey=True)
    for panel, budget in zip(panels, (4.0, 9.0), strict=True):
        for mode, marker in (("uniform", "s"), ("linear", "o"), ("sense", "^")):
            given = {"sensitivities": sensitivities} if mode == "sense" else {}
            rates = cdb_jax.drop_path_rates(12, budget, mode=mode, maximum=0.95, **given)
            panel.plot(range(1, 13), rates, marker + "-", label=mode, linewidth=1)
        panel.set(xlabel="branch", title=f"{budget:g} of 12 branches kept", ylim=(-0.05, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("drop rate")
    panels[1].legend()
    save(figure, "stochastic_depth")


def layer_drop_back() -> None:
    """Which tensors learn, and the learning rate, over five epochs."""
    names = [f"block{i}/{leaf}" for i in range(4) for leaf in ("kernel", "bias")]
    tree = {f"block{i}": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)} for i in range(4)} | {
        "head": {"kernel": jnp.zeros((2, 2))}
    }
    policy = cdb_jax.presets.layer_drop_back(key=0, exempt=("head",), steps_per_epoch=10)
    steps = range(50)
    selections = [policy.select(tree, step).factors for step in steps]
    learns = [[float(x[name][0]) for x in selections] for name in names]
    learns.append([1.0] * len(steps))
    cosine = optax.cosine_decay_schedule(0.01, len(steps))

    def doubled(count):
        return 2 * cosine(count)

    rate = cdb_jax.presets.every_nth_epoch(doubled, cosine, steps_per_epoch=10)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(10, 4.2), sharex=True, height_ratios=(3, 1)
    )
    top.pcolormesh(learns, cmap="Blues", vmin=-0.15, vmax=1.4, edgecolors="w", linewidth=0.5)
    top.set_yticks(np.arange(len(names) + 1) + 0.5, [*names, "head/kernel"])
    top.set_title("dark tensors learn; in every second epoch each is frozen with probability 0.5")
    bottom.step(steps, [float(rate(step)) for step in steps], where="post", label="doubled")
    bottom.step(
        steps, [float(cosine(step)) for step in steps], "--", where="post", label="schedule"
    )
    bottom.legend()
    bottom.set(xlabel="step (an epoch has 10)", ylabel="learning rate", ylim=(0, None))
    save(figure, "layer_drop_back")


def skip_update() -> None:
    """The factors of the updates of some tensors, and their mean over steps."""
    policy = cdb_jax.presets.skip_update(0.5, key=0, exempt=())
    tree, steps = {f"kernel{i:02}": jnp.zeros((2, 2)) for i in range(24)}, 200

    def of_step(step: jax.Array) -> jax.Array:
        return jnp.concatenate([*policy.select(tree, step).factors.values()])

    factors = np.array(jax.vmap(of_step)(jnp.arange(steps)))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3))
    grid = dict(edgecolors="w", linewidth=0.5)
    shown = left.pcolormesh(factors[:48].T, cmap="Blues", vmin=0, vmax=2, **grid)
    figure.colorbar(shown, ax=left, label="factor on the update", ticks=[0, 2])
    left.set(xlabel="step", ylabel="weight tensor")
    means = np.cumsum(factors, axis=0) / np.arange(1, steps + 1)[:, None]
    right.plot(means, color="C0", alpha=0.3, linewidth=0.7)
    right.axhline(1.0, color="k", linewidth=0.8)
    right.set(xlabel="step", ylabel="mean factor so far", ylim=(0, 2.1))
    save(figure, "skip_update")


def skipping() -> None:
    """The three products of a dense layer in a training step, with a window of channels kept."""
    batch, inputs, outputs = 4, 6, 12
    policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
    tree = {"kernel": jnp.zeros((inputs, outputs))}
    kept = np.asarray(policy.select(tree, 2).factors["kernel"]) > 0

    def full(rows, columns):
        return np.ones((rows, columns), bool)

    def part(rows):
        return np.broadcast_to(kept, (rows, outputs))

    x, w, y = full(batch, inputs), full(inputs, outputs), full(batch, outputs)
    rows = {
        "forward: y = x w, in full": (("y", y), ("x", x), ("w", w)),
        "backward to x: dx = dy wᵀ, in full": (("dx", x), ("dy", y), ("wᵀ", w.T)),
        "backward to w: dw = xᵀ dy, kept channels only": (
            ("dw", part(inputs)),
            ("xᵀ", x.T),
            ("dy", part(batch)),
        ),
    }
    height, gap = outputs - 0.7, 2.2
    figure, panel = pyplot.subplots(figsize=(10, 6.3))
    for row, (title, matrices) in enumerate(rows.items()):
        middle = -row * height
        panel.text(-13, middle, title.replace(": ", ":\n"), va="center", fontsize=11)
        left = 2.0
        for (name, cells), sign in zip(matrices, ("=", "·", ""), strict=True):
            top = middle + len(cells) / 2
            for (i, j), computed in np.ndenumerate(cells):
                panel.add_patch(
                    pyplot.Rectangle(
                        (left + j, top - i - 1),
                        1,
                        1,
                        facecolor="C0" if computed else "0.95",
                        alpha=0.75 if computed else 1.0,
                        hatch="" if computed else "////",
                        edgecolor="w" if computed else "0.75",
                        linewidth=1,
                    )
                )
            width = cells.shape[1]
            panel.text(left + width / 2, top + 0.3, name, ha="center", va="bottom", fontsize=12)
            left += width + gap
            panel.text(left - gap / 2, middle, sign, ha="center", va="center", fontsize=14)
    computed = pyplot.Rectangle((0, 0), 1, 1, facecolor="C0", alpha=0.75)
    dropped = pyplot.Rectangle((0, 0), 1, 1, facecolor="0.95", hatch="////", edgecolor="0.75")
    labels = ["computed or read", "dw: zero, not computed; dy: not read"]
    figure.legend([computed, dropped], labels, loc="outside lower center", ncols=2, frameon=False)
    panel.set(xlim=(-13, 37.5), ylim=(-2 * height - 4, 5.5), aspect="equal")
    panel.axis("off")
    save(figure, "skipping")


if __name__ == "__main__":
    for draw in (freezing, backdrop, stochastic_depth, layer_drop_back, skip_update, skipping):
        draw()
