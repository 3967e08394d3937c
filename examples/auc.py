"""Backdrop for a loss that does not decompose over examples: the area under the ROC curve.

    python examples/auc.py                  # under a minute on two cores

Whether a digit is an 8 (a tenth of them are) is learned by ranking: the loss compares every 8 of a
batch with every other digit, so it needs the whole batch, and mini-batches of single examples,
whose noise usually regularises, cannot be had. A `backdrop` over the batch axis gives that noise
back: the loss sees all scores, and the gradient only some of them (arXiv 1806.01337).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import cdb_jax
import display
from errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn to rank 8s above other digits, with Backdrop over the batch and without."""

    rates: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Probabilities that the gradient of an example is dropped; 0 is the plain loss."""
    train_size: int = 200
    """Training images, all of which form one batch."""
    steps: int = 300
    """Steps of Adam."""
    learning_rate: float = 3e-3
    """Constant."""
    seeds: int = 10
    """Runs of each rate; the same seed means the same split and first parameters."""

    def __post_init__(self) -> None:
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in self.rates):
            raise UserError(f"--rates {self.rates} must be probabilities between 0 and 1.")
        if not 50 <= self.train_size <= 1500:
            raise UserError(f"--train-size {self.train_size} must be from 50 to 1500 of 1797.")
        if len(set(self.rates)) < len(self.rates):
            raise UserError(f"--rates {self.rates} repeats a rate; name each once.")
        if min(self.seeds, self.steps, self.learning_rate) <= 0:
            raise UserError("--seeds, --steps and --learning-rate must be positive.")


class Ranker(nnx.Module):
    """Images (batch, 64) to scores (batch,)."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.head = nnx.Linear(128, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(x)))[:, 0]


def ranking_loss(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """The mean of log(1 + exp(s_n - s_p)) over all pairs of a positive p and a negative n.

    A smooth upper bound, up to a factor log 2, of one minus the area under the ROC curve.
    """
    pairs = positive[:, None] & ~positive[None, :]
    losses = jax.nn.softplus(scores[None, :] - scores[:, None])
    return jnp.sum(jnp.where(pairs, losses, 0.0)) / jnp.sum(pairs)


def train(config: Config, rate: float, seed: int) -> tuple[float, float]:
    """Area under the ROC curve of the training and of the test images."""
    digits = load_digits()
    split = train_test_split(
        (digits.data / 16).astype(np.float32),
        digits.target == 8,
        train_size=config.train_size,
        random_state=seed,
        stratify=digits.target,
    )
    images, test_images, positive, test_positive = split
    model = Ranker(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(config.learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model: Ranker, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        def loss_fn(model: Ranker) -> jax.Array:
            scores = cdb_jax.backdrop(model(images), rate, axes=0, key=key)
            return ranking_loss(scores, jnp.asarray(positive))

        optimizer.update(model, nnx.grad(loss_fn)(model))

    for key in jax.random.split(jax.random.key(seed), config.steps):
        step(model, optimizer, key)
    return (
        float(roc_auc_score(positive, model(images))),
        float(roc_auc_score(test_positive, model(test_images))),
    )


def main() -> None:
    try:
        config = tyro.cli(Config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    results = {
        rate: np.array([train(config, rate, seed) for seed in range(config.seeds)])
        for rate in config.rates
    }
    base = config.rates[0]
    lines = [
        (
            f"backdrop {rate}" if rate else "without",
            f"{100 * found[:, 0].mean():.2f}",
            display.percent(found[:, 1]),
            "" if rate == base else display.percent(found[:, 1] - results[base][:, 1], "+"),
        )
        for rate, found in results.items()
    ]
    columns = ("", "training AUC (%)", "test AUC (%)", f"against {lines[0][0]}")
    title = f"Is it an 8? {config.seeds} seeds, 95 % intervals, paired by seed"
    display.console().print(display.ResultsTable(title, columns, lines))


if __name__ == "__main__":
    main()
