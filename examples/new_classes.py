"""Teaches a trained classifier two new classes by training two columns of its last layer.

    python examples/new_classes.py

A network learns the digits 0 to 7. Then the digits 8 and 9 arrive, and nothing that it has learned
may change. `Selection.of` selects the two new output channels, and `value_and_grad` computes the
gradient of those alone. Takes about ten seconds on a laptop.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cdb_jax.nnx

OLD, NEW = np.arange(8), np.array([8, 9])


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16.0
    split = train_test_split(images, labels, test_size=500, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    return train_x, train_y, test_x, test_y


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(64, 256, rngs=rngs)
        self.hidden2 = nnx.Linear(256, 256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden2(nnx.relu(self.hidden1(x))))
        return self.head(x)


def loss_fn(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def fit(model: Net, x: jax.Array, y: jax.Array, selection: cdb_jax.Selection, steps: int) -> float:
    """Trains what a selection selects. Returns the FLOPs of one step."""
    tx = optax.adam(2e-3)

    @nnx.jit
    def step(model, opt_state, x, y):
        grads = cdb_jax.nnx.grad(loss_fn)(model, x, y, selection=selection)
        params = nnx.state(model, nnx.Param)
        updates, opt_state = tx.update(grads, opt_state, params)
        # Adam divides zero by almost zero; the mask keeps every other weight as it is.
        nnx.update(model, optax.apply_updates(params, selection.mask(updates)))
        return opt_state

    opt_state = tx.init(nnx.state(model, nnx.Param))
    order = np.random.default_rng(0)
    for _ in range(steps):
        batch = order.integers(len(x), size=128)
        opt_state = step(model, opt_state, x[batch], y[batch])
    return step.lower(model, opt_state, x[:128], y[:128]).cost_analysis()["flops"]


def accuracy(model: Net, x: jax.Array, y: jax.Array, classes: np.ndarray) -> float:
    chosen = np.isin(y, classes)
    return 100 * float(jnp.mean(model(x[chosen]).argmax(-1) == y[chosen]))


def main() -> None:
    train_x, train_y, test_x, test_y = load()
    model = Net(nnx.Rngs(0))
    is_old = np.isin(train_y, OLD)
    head = {"head/kernel": OLD, "head/bias": OLD}
    everything_else = cdb_jax.Selection.of(model, head)  # The other layers learn in full.
    full_flops = fit(model, train_x[is_old], train_y[is_old], everything_else, steps=300)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    old_before, new_before = (accuracy(model, test_x, test_y, x) for x in (OLD, NEW))

    head = {"head/kernel": NEW, "head/bias": NEW}
    two_columns = cdb_jax.Selection.of(model, head, others="frozen")
    flops = fit(model, train_x, train_y, two_columns, steps=300)
    after = nnx.state(model, nnx.Param)
    changed = jax.tree.map(lambda x, y: int(jnp.sum(x != y)), before, after)

    print("accuracy in %      digits 0-7  digits 8-9")
    print(f"first training     {old_before:10.1f}  {new_before:10.1f}")
    old_after, new_after = (accuracy(model, test_x, test_y, x) for x in (OLD, NEW))
    print(f"two new columns    {old_after:10.1f}  {new_after:10.1f}")
    total = sum(x.size for x in jax.tree.leaves(after))
    print(f"{sum(jax.tree.leaves(changed)):,} of {total:,} weights have changed.")
    share = 100 * flops / full_flops
    print(f"A step takes {share:.0f} % of the FLOPs of a step of the first training.")


if __name__ == "__main__":
    main()
