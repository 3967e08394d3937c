"""Backdrop on two-scale textures: a mask in the backward pass at the scale of each.

    python examples/gp_textures.py                  # 128 pixels, some minutes on two cores
    python examples/gp_textures.py --size 1024 --width 64 --images 100 --seeds 20  # as the paper

Every image is the sum of two Gaussian-process textures, a fine and a coarse one, each with one of
two length scales, so that there are four classes (Backdrop, arXiv 1806.01337). A network with a
`Backdrop` layer where its receptive field matches the fine scale, and another where it matches the
coarse one, is trained with and without them. Drawn are the textures, the masks, the gradients that
pass them and the curves: runs/gp_textures/*.png. At the small default size a few seeds show no
difference in accuracy; what Backdrop does is to be seen in the pictures.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx

import cdb_jax.nnx
import display
from errors import UserError
from gaussian_process import texture
from locations import LocalPath

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

FULL_SIZE = 1024  # Pixels of the paper's images, to which its length scales refer.
FINE, COARSE = (9.5, 10.0), (80.0, 140.0)
POWERS = (0.75, 1.25)  # Weights of the fine and the coarse texture.


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the two-mask network on two-scale textures, with Backdrop and without."""

    size: int = 128
    """Side of an image in pixels. Length scales shrink with it: 10, 80 and 140 at 1,024 pixels."""
    fine_ratio: float | None = None
    """Ratio of the two fine length scales; None: 10 / 9.5 at 1,024 pixels, as in the paper, and 1.5
    below, where that could not be seen."""
    images: int = 40
    """Training images, a quarter of each class."""
    test_images: int = 200
    """Test images."""
    fine_rate: float = 0.85
    """Drop probability of the mask at the fine scale; 0 for none."""
    coarse_rate: float = 0.95
    """Drop probability of the mask at the coarse scale; 0 for none."""
    width: int = 32
    """Channels of the network; 64 in the authors' demonstration."""
    epochs: int = 60
    """Passes over the training images."""
    batch_size: int = 20
    """Images a step."""
    learning_rate: float = 2e-3
    """Of Adam, falling along a cosine."""
    seeds: int = 3
    """Runs of each kind; the same seed means the same images, first parameters and batches."""
    run_dir: LocalPath = Path("runs/gp_textures")
    """Where pictures and results go."""

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size", "learning_rate", "seeds"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)} must be positive.")
        if self.size < 32 or self.size & (self.size - 1):
            raise UserError(f"--size {self.size} must be a power of two, 32 at least.")
        for name in ("images", "test_images"):
            if getattr(self, name) < 4 or getattr(self, name) % 4:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)} must be a multiple of 4 classes.")
        if self.images % self.batch_size:
            raise UserError(f"--batch-size {self.batch_size} must divide --images {self.images}.")
        for name in ("fine_rate", "coarse_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)} must be a probability.")
        if self.fine_ratio is not None and not self.fine_ratio > 1.0:
            raise UserError(f"--fine-ratio {self.fine_ratio} must be more than 1.")


def length_scales(config: Config) -> tuple[tuple[float, float], tuple[float, float]]:
    """Fine and coarse length scales in pixels of these images."""
    shrink = config.size / FULL_SIZE
    ratio = config.fine_ratio or (FINE[1] / FINE[0] if config.size >= FULL_SIZE else 1.5)
    fine = (FINE[1] / ratio, FINE[1])
    return tuple(shrink * x for x in fine), tuple(shrink * x for x in COARSE)


def textures(key: jax.Array, count: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """Images, shape (count, size, size, 1), and labels 0 to 3: bit 0 is the fine scale."""
    fine, coarse = length_scales(config)
    labels = jnp.arange(count) % 4

    @jax.jit
    def image(key: jax.Array, label: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        small = texture(keys[0], config.size, jnp.asarray(fine)[label % 2])
        large = texture(keys[1], config.size, jnp.asarray(coarse)[label // 2])
        return POWERS[0] * small + POWERS[1] * large

    return jax.lax.map(lambda x: image(*x), (jax.random.split(key, count), labels))[
        ..., None
    ], labels


class Net(nnx.Module):
    """The authors' demonstration network: convolutions, two masks, global average, a dense layer.

    A 5x5 convolution of stride 2, then 2x2 ones of stride 2: at 1,024 pixels four before the fine
    mask and three more before the coarse one, at fewer pixels as many as there is room for.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.width

        def conv(into, size):
            return nnx.Conv(into, width, (size, size), strides=2, rngs=rngs)

        # The side of the images decides how many halvings there are room for.
        halvings = config.size.bit_length() - 1
        before_fine, before_coarse = max(0, halvings - 6), max(1, min(3, halvings - 4))
        self.stem = conv(1, 5)
        self.fine = nnx.List([conv(width, 2) for _ in range(before_fine)])
        self.coarse = nnx.List([conv(width, 2) for _ in range(before_coarse)])
        self.mask_fine = cdb_jax.nnx.Backdrop(config.fine_rate, (1, 2), rngs=rngs)
        self.mask_coarse = cdb_jax.nnx.Backdrop(config.coarse_rate, (1, 2), rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def features(self, x: jax.Array, at_fine: jax.Array | float = 0.0) -> jax.Array:
        """The last feature map; `at_fine` is added at the fine mask, to look at its gradient."""
        x = nnx.relu(self.stem(x))
        for layer in self.fine:
            x = nnx.relu(layer(x))
        x = self.mask_fine(x + at_fine)
        for layer in self.coarse:
            x = nnx.relu(layer(x))
        return x

    def __call__(self, x: jax.Array, at_fine: jax.Array | float = 0.0) -> jax.Array:
        x = self.mask_coarse(self.features(x, at_fine))
        return self.head(jnp.mean(x, axis=(1, 2)))


def train(config: Config, seed: int, data: tuple[jax.Array, ...]) -> list[dict[str, float]]:
    """The metrics of every epoch."""
    images, labels, test_images, test_labels = data
    stream = nnx.Rngs(params=seed, backdrop=seed + 1000)
    model = Net(config, rngs=stream)
    steps = config.epochs * (config.images // config.batch_size)
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model: Net, images: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    @nnx.jit
    def epoch(model: Net, optimizer: nnx.Optimizer, order: jax.Array) -> jax.Array:
        losses = []
        for batch in order:  # A loop of the compiler's own runs convolutions slowly on CPU.
            loss, grads = nnx.value_and_grad(loss_fn)(model, images[batch], labels[batch])
            optimizer.update(model, grads)
            losses.append(loss)
        return jnp.mean(jnp.stack(losses))

    @nnx.jit
    def accuracy(model: Net) -> jax.Array:
        return jnp.mean(jnp.argmax(model(test_images), axis=-1) == test_labels)

    rng, rows = np.random.default_rng(seed), []
    for number in range(1, config.epochs + 1):
        order = rng.permutation(config.images).reshape(-1, config.batch_size)
        loss = epoch(model, optimizer, jnp.asarray(order))
        if number % 5 == 0 or number == config.epochs:
            model.eval()
            rows.append(
                {
                    "epoch": number,
                    "train_loss": float(loss),
                    "test_accuracy": float(accuracy(model)),
                }
            )
            model.train()
    return rows


def draw_gradients(config: Config, data: tuple[jax.Array, ...], file: Path) -> None:
    """Masks, and the gradient that passes the fine one: without masks, with each and with both."""
    image, label = data[0][:1], data[1][:1]
    model = Net(config, rngs=nnx.Rngs(params=0, backdrop=1))
    cases = {
        "no mask": (0.0, 0.0),
        "fine mask": (config.fine_rate, 0.0),
        "coarse mask": (0.0, config.coarse_rate),
        "both": (config.fine_rate, config.coarse_rate),
    }

    def loss(model: Net, at_fine: jax.Array) -> jax.Array:
        logits = model(image, at_fine)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    figure, panels = pyplot.subplots(2, 4, figsize=(11, 5.6))
    panels[0, 0].imshow(image[0, ..., 0], cmap="gray")
    panels[0, 0].set_title("image")
    size = jax.eval_shape(lambda: model.stem(image)).shape[1] // 2 ** len(model.fine)
    masks = {
        "fine mask": (model.mask_fine, size),
        "coarse mask": (model.mask_coarse, size // 2 ** len(model.coarse)),
    }
    for panel, (title, (layer, side)) in zip(panels[0, 1:], masks.items(), strict=False):
        factors = nnx.grad(lambda layer, x: layer(x).sum(), argnums=1)
        panel.imshow(factors(layer, jnp.ones((1, side, side, 1)))[0, ..., 0], cmap="magma")
        panel.set_title(f"{title}, {side}x{side}")
    for panel, (title, (fine, coarse)) in zip(panels[1], cases.items(), strict=True):
        model.mask_fine.rate, model.mask_coarse.rate = fine, coarse

        # What passes the fine mask: the gradient of something that is added before it.
        added = jnp.zeros((1, size, size, config.width))
        gradient = nnx.grad(loss, argnums=1)(model, added)
        shown = jnp.linalg.norm(gradient[0], axis=-1)
        panel.imshow(shown, cmap="magma")
        panel.set_title(f"gradient, {title}")
    for panel in panels.ravel():
        panel.set_axis_off()
    figure.savefig(file)
    pyplot.close(figure)


def draw_textures(config: Config, data: tuple[jax.Array, ...], file: Path) -> None:
    fine, coarse = length_scales(config)
    figure, panels = pyplot.subplots(1, 4, figsize=(11, 3))
    for label, panel in enumerate(panels):
        panel.imshow(data[0][label, ..., 0], cmap="gray")
        panel.set_title(f"class {label}: {fine[label % 2]:.3g} and {coarse[label // 2]:.3g} px")
        panel.set_axis_off()
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    try:
        config = tyro.cli(Config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    out = display.console()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    plain = dataclasses.replace(config, fine_rate=0.0, coarse_rate=0.0)
    kinds = {"without": plain, "Backdrop": config}
    histories: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in kinds}
    for seed in range(config.seeds):
        keys = jax.random.split(jax.random.key(seed))
        data = (
            *textures(keys[0], config.images, config),
            *textures(keys[1], config.test_images, config),
        )
        if seed == 0:
            draw_textures(config, data, config.run_dir / "textures.png")
            draw_gradients(config, data, config.run_dir / "gradients.png")
        for kind, settings in kinds.items():
            histories[kind].append(train(settings, seed, data))
            row = histories[kind][-1][-1]
            out.print(
                f"seed {seed}, {kind}: training loss {row['train_loss']:.4f}, test accuracy "
                f"{row['test_accuracy']:.2%}",
                soft_wrap=True,
            )
    title = f"Two-scale textures, {config.size} px, {config.seeds} seeds"
    display.plot_curves(histories, config.run_dir / "curves.png", title)
    (config.run_dir / "results.json").write_text(json.dumps(histories, indent=1) + "\n")
    last = {
        kind: np.array([rows[-1]["test_accuracy"] for rows in histories[kind]]) for kind in kinds
    }
    gain = display.percent(last["Backdrop"] - last["without"], "+")
    out.print(f"test accuracy, Backdrop against without: {gain} points (95 % interval)")
    out.print(f"pictures: {config.run_dir}/textures.png, gradients.png, curves.png")


if __name__ == "__main__":
    main()
