"""ChannelDropBack in one file: a small network on scikit-learn's digits.

python examples/quickstart.py
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cdb_jax

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16.0
train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=500, random_state=0)

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs))
# Half of the channels learn in each step; the last layer always learns.
policy = cdb_jax.Policy(0.5, key=jax.random.key(0), channel_choice="window", exempt=("layers/2",))
print(cdb_jax.channel_report(nnx.state(model, nnx.Param), policy))
tx = optax.chain(cdb_jax.channel_drop_back(policy), optax.adamw(3e-3))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
    def loss(m):
        return optax.softmax_cross_entropy_with_integer_labels(m(x), y).mean()

    selection = policy.select(model, cdb_jax.selection_count(optimizer.opt_state))
    # The gradients of dropped channels are not computed.
    value, gradients = cdb_jax.nnx.value_and_grad(loss)(model, selection=selection)
    optimizer.update(model, gradients, selection=selection)
    return value


order = np.random.default_rng(0)
for _ in range(400):
    batch = order.integers(len(train_x), size=128)
    loss = step(model, optimizer, train_x[batch], train_y[batch])
accuracy = (model(test_x).argmax(-1) == test_y).mean()
print(f"loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
