"""Flax Linen: `channel_drop_back` goes into the optimizer and the training loop stays as it was.

Run it with `python examples/linen_example.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cdb_jax


class CNN(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 8, 8, 1) to logits (batch, 10)."""
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = state.apply_fn({"params": state.params}, images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def main() -> None:
    digits = load_digits()
    images, test_images, labels, test_labels = train_test_split(
        (digits.images[..., None] / 16).astype(np.float32),
        digits.target.astype(np.int32),
        train_size=1400,
        random_state=0,
    )

    model = CNN()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), images[:1])["params"],
        tx=optax.chain(
            cdb_jax.channel_drop_back(0.3, key=jax.random.key(1)),
            optax.adamw(1e-3),
        ),
    )
    rng = np.random.default_rng(0)
    for epoch in range(1, 11):
        for batch in rng.permutation(len(images)).reshape(-1, 56):
            state = train_step(state, images[batch], labels[batch])
        print(f"epoch {epoch:2}  test accuracy {accuracy(state, test_images, test_labels):.2%}")


if __name__ == "__main__":
    main()
