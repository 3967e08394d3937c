"""The published variants of ChannelDropBack as policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import channels
from cdb_jax._checks import check_bool, check_patterns, check_positive, check_rate
from cdb_jax.policy import ChannelChoice, Key, LayerWeights, OtherLayers, Policy, Rate

StepsPerEpoch = int | tuple[int, int]
Value = float | jax.typing.ArrayLike | Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


def released_code(
    *, key: Key, exempt: tuple[str, ...], rate: Rate = 0.3, layer_rate: Rate = 0.3
) -> Policy:
    r"""The rules of the authors' released optimizer.

    Every layer is masked with probability `layer_rate` (`dropback_rate` there); in a masked layer
    each *input* channel is dropped with probability `rate` (`dropback_rate_channels`), and the
    gradient is divided by the fraction of channels kept in this draw. Biases and normalisation
    always learn.

    Place it before the optimizer: in the released code, weight decay and Nesterov momentum come
    after the mask.

    Args:
      key: as in `Policy`.
      exempt: path patterns of the first layers, or `()` for none. The released code skips the
        parameters with index 0 to `skip_init_layers` (3 by default) in order of definition. A JAX
        tree has no such order, so name them, such as `("stem", "blocks/0/conv1")` for a ResNet.
      rate: drop probability of a channel in a masked layer.
      layer_rate: probability that a layer is masked; `released_layer_rate` is its schedule.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax, optax
      >>> policy = cdb_jax.presets.released_code(
      ...     key=0,
      ...     exempt=("stem",),
      ...     layer_rate=cdb_jax.presets.released_layer_rate(epochs=200, steps_per_epoch=391),
      ... )
      >>> tx = optax.chain(
      ...     cdb_jax.channel_drop_back(policy),
      ...     optax.add_decayed_weights(5e-4),
      ...     optax.sgd(0.01, momentum=0.9, nesterov=True),
      ... )

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_.
    """
    return Policy(
        rate,
        key=key,
        channel_axes=channels.input_channels,
        layer_rate=layer_rate,
        rescale="realized",
        exempt=exempt,
    )


def released_layer_rate(
    *, epochs: int, steps_per_epoch: int, initial: float = 0.03, final: float = 0.3
) -> optax.Schedule:
    """The released code's schedule of the layer rate, in three phases.

    With E epochs, the rate is `initial` before epoch `round(0.3 * E) + 2`, counted from 0,
    `final / 2` before epoch `round(0.6 * E) + 2`, and then `final`. This is two epochs after the
    released code changes the learning rate.

    Args:
      epochs: length of training in epochs, at least 1.
      steps_per_epoch: number of steps in an epoch, at least 1.
      initial: layer rate of the first phase.
      final: layer rate of the last phase.

    Returns:
      An optax schedule from count to rate.

    Raises:
      ValueError: if `epochs` or `steps_per_epoch` is not a positive int, or a rate is not in
        [0, 1].

    Examples:
      >>> schedule = released_layer_rate(epochs=10, steps_per_epoch=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 499, 500, 799, 800, 999)]
      [0.03, 0.03, 0.15, 0.15, 0.3, 0.3]
    """
    check_positive("epochs", epochs)
    check_positive("steps_per_epoch", steps_per_epoch)
    for name, value in (("initial", initial), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a drop probability between 0 and 1, got {value!r}.")
    phases = [optax.constant_schedule(value) for value in (initial, final / 2, final)]
    changes = [(round(part * epochs) + 2) * steps_per_epoch for part in (0.3, 0.6)]
    return optax.join_schedules(phases, changes)


def layer_drop_back(
    *,
    key: Key,
    exempt: tuple[str, ...],
    steps_per_epoch: StepsPerEpoch,
    layer_rate: Rate = 0.5,
    every: int = 2,
    stack: Mapping[str, int | tuple[int, ...]] | None = None,
) -> Policy:
    r"""LayerDropBack: each tensor is frozen independently with probability `layer_rate`.

    This happens in every step of some epochs, counted from 0: `every`, `2 * every` and so on, as in
    the authors' code. It includes biases and normalisation; in the other epochs all tensors learn.
    The authors' code never drops the last two tensors, and its optimizer skips a dropped tensor:
    `freeze_dropped` does that, while `channel_drop_back` gives it a gradient of zero.

    In the epochs with dropping, that code also changes the learning rate (`every_nth_epoch`): it
    doubles it, keeps it or divides it by `1 - layer_rate`. The fine-tuning script doubles the batch
    size in these epochs, so that they have half as many steps; the other script can do so too.

    The paper claims 17 to 24 % less training time. We could not confirm where that comes from: a
    spreadsheet that the authors published shows no saving at an unchanged batch size, and about a
    sixth at the doubled batch size. `cdb_jax.value_and_grad` does save time at an unchanged batch
    size, because it does not compute the weight gradients of frozen tensors.

    Args:
      key: as in `Policy`.
      exempt: path patterns of tensors that always learn; in the authors' code the last two, such
        as `("head",)` for a last layer with its bias.
      steps_per_epoch: number of steps in an epoch, at least 1. If epochs with dropping have larger
        batches, a pair: the number of steps without dropping, and the number with dropping.
      layer_rate: probability that a tensor is frozen in an epoch with dropping.
      every: the distance between epochs with dropping.
      stack: the axes along which layers are stacked, by path: `{"blocks": 0}` for blocks under a
        scan. Each index is then frozen independently.

    Returns:
      A `Policy`.

    Raises:
      ValueError: if `steps_per_epoch` or `every` is not positive; when the policy is used, for a
        path in `stack` that the parameters do not have.

    Examples:
      >>> import cdb_jax, optax
      >>> policy = cdb_jax.presets.layer_drop_back(key=0, exempt=("head",), steps_per_epoch=100)
      >>> policy.rate, [float(policy.layer_rate(step)) for step in (0, 199, 200, 299, 300, 400)]
      (1.0, [0.0, 0.0, 0.5, 0.5, 0.0, 0.5])
      >>> learning_rate = cdb_jax.presets.every_nth_epoch(0.02, 0.01, steps_per_epoch=100)
      >>> tx = cdb_jax.freeze_dropped(optax.sgd(learning_rate, momentum=0.9), policy)

    References:
      LayerDropBack, `arXiv 2412.18027 <https://arxiv.org/abs/2412.18027>`_.
    """
    check_positive("every", every)
    layer_rate = check_rate("layer_rate", layer_rate)
    schedule = every_nth_epoch(layer_rate, 0.0, steps_per_epoch=steps_per_epoch, n=every)
    return Policy(
        1.0,
        key=key,
        channel_axes=_whole_layers(stack),
        layer_rate=schedule,
        channel_choice="window",  # Draws nothing for the channels.
        exempt=exempt,
    )


def every_nth_epoch(
    value: Value, otherwise: Value, *, steps_per_epoch: StepsPerEpoch, n: int = 2
) -> optax.Schedule:
    """A schedule with one value on every `n`-th epoch, and another on the rest.

    LayerDropBack alternates its layer rate and its learning rate in this way.

    Args:
      value: on epochs `n`, `2 * n` and so on, counted from 0: a number or a schedule.
      otherwise: on the other epochs: a number or a schedule.
      steps_per_epoch: number of steps in an epoch, at least 1, or a pair: in the other epochs, and
        in an `n`-th epoch.
      n: at least 1; with 1 every epoch but the first has `value`.

    Returns:
      An optax schedule from count to a float32 scalar.

    Raises:
      ValueError: if `steps_per_epoch` or `n` is not positive.

    Examples:
      >>> import cdb_jax, optax
      >>> cosine = optax.cosine_decay_schedule(0.1, 200)
      >>> doubled = lambda count: 2 * cosine(count)
      >>> schedule = cdb_jax.presets.every_nth_epoch(doubled, cosine, steps_per_epoch=50)
      >>> [round(float(schedule(step)), 3) for step in (0, 99, 100, 149, 150)]
      [0.1, 0.051, 0.1, 0.03, 0.015]

    References:
      LayerDropBack, `arXiv 2412.18027 <https://arxiv.org/abs/2412.18027>`_.
    """
    epochs = _Epochs.checked(steps_per_epoch, n)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        is_nth = epochs.position(count)[1]
        return jnp.where(is_nth, _value_at(value, count), _value_at(otherwise, count))

    return schedule


def by_epoch(
    schedule: optax.Schedule, *, steps_per_epoch: StepsPerEpoch, n: int = 2
) -> optax.Schedule:
    """Turns a schedule of epochs into a schedule of steps, where epochs differ in length.

    If every `n`-th epoch has larger batches, the step is not proportional to the progress of
    training. This passes the number of epochs, which may be fractional, to `schedule`.

    Args:
      schedule: a function of a float32 number of epochs.
      steps_per_epoch, n: as in `every_nth_epoch`.

    Returns:
      An optax schedule from count to what `schedule` returns.

    Raises:
      ValueError: if `steps_per_epoch` or `n` is not positive.

    Examples:
      >>> import cdb_jax, optax
      >>> cosine = optax.cosine_decay_schedule(0.1, 4)  # Four epochs.
      >>> schedule = cdb_jax.presets.by_epoch(cosine, steps_per_epoch=(50, 25))
      >>> [round(float(schedule(step)), 3) for step in (0, 100, 125, 175)]
      [0.1, 0.05, 0.015, 0.0]
    """
    epochs = _Epochs.checked(steps_per_epoch, n)
    return lambda count: schedule(epochs.position(count)[0])


class _Epochs(NamedTuple):
    """Epochs counted from 0, of which every `n`-th, but not the first, has another length."""

    n: int
    steps: int
    nth_steps: int

    @classmethod
    def checked(cls, steps_per_epoch: StepsPerEpoch, n: int) -> _Epochs:
        pair = steps_per_epoch if isinstance(steps_per_epoch, tuple) else (steps_per_epoch,) * 2
        if len(pair) != 2:
            raise ValueError(f"steps_per_epoch must be an int or two, got {steps_per_epoch!r}.")
        steps = [check_positive("steps_per_epoch", x) for x in pair]
        return cls(check_positive("n", n), *steps)

    def position(self, count: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The fractional number of epochs before a step, and whether it is in an n-th epoch."""
        count = jnp.asarray(count)
        others = (self.n - 1) * self.steps  # Between two n-th epochs.
        cycle, step = jnp.divmod(count - self.steps, others + self.nth_steps)
        is_nth = (count >= self.steps) & (step >= others)
        done = jnp.where(
            is_nth,
            self.n - 1 + (step - others).astype(jnp.float32) / self.nth_steps,
            step.astype(jnp.float32) / self.steps,
        )
        later = 1 + (cycle * self.n).astype(jnp.float32) + done
        first = count.astype(jnp.float32) / self.steps
        return jnp.where(count < self.steps, first, later), is_nth


def _value_at(value: Value, count: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def skip_update(
    rate: Rate = 0.5, *, key: Key, exempt: tuple[str, ...], by_column: bool = False
) -> Policy:
    r"""SkipUpdate: random tensors skip the optimizer's update, and the others make up for it.

    The mask applies to the *updates*, so place it after the optimizer, whose moments then see
    every gradient. Kept updates are divided by the probability of being kept, so that the expected
    update stays the same:

    .. math:: \theta \leftarrow \theta + \frac{b}{\Pr(b = 1)}\, u, \qquad u = \mathrm{inner}(g).

    As in the paper, a draw is shared by a whole weight tensor, and embeddings are left alone: name
    them in `exempt`. The paper's second method, Magma, which weights updates by their agreement
    with the momentum, is not included.

    Args:
      rate: probability that a tensor skips an update.
      key: as in `Policy`.
      exempt: path patterns of leaves that are always updated, such as `("embed",)`; `()` for none.
      by_column: whether each output channel of a weight has its own draw, which the paper does not
        do. Biases and normalisation are then always updated.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax, optax
      >>> policy = cdb_jax.presets.skip_update(0.5, key=0, exempt=("embed",))
      >>> tx = optax.chain(optax.adamw(1e-3), cdb_jax.channel_drop_back(policy))

    References:
      `arXiv 2602.15322 <https://arxiv.org/abs/2602.15322>`_.
    """
    check_bool("by_column", by_column)
    if by_column:
        return Policy(rate, key=key, rescale="expected", exempt=exempt)
    return Policy(
        1.0,
        key=key,
        channel_axes=channels.Axes(()),
        layer_rate=rate,
        rescale="expected",
        exempt=exempt,
    )


def lisa(
    *,
    key: Key,
    exempt: tuple[str, ...],
    blocks: tuple[str, ...] = (),
    stack: Mapping[str, int | tuple[int, ...]] | None = None,
    num_layers: int = 2,
    hold: int = 100,
) -> Policy:
    """A few random blocks learn for some steps; embeddings and head always learn, as in LISA.

    A leaf that `blocks`, `stack` and `exempt` do not cover counts as a separate block.

    Pass it to `compact` to keep optimizer state for these blocks only, and to `value_and_grad` to
    compute no other weight gradients. Only blocks that are stacked (scanned) save state: unrolled
    blocks have separate leaves, any of which may be picked, so each has full state.

    The paper picks blocks at random and always trains the embeddings and the head. We could not
    confirm how many blocks it picks, and for how many steps: `num_layers` and `hold` are examples
    to start from.

    Args:
      key: as in `Policy`.
      exempt: path patterns of leaves that always learn, such as `("embed", "head")`.
      blocks: path patterns of unrolled blocks, such as `("blocks/*",)`.
      stack: a dict from the path of stacked blocks (no pattern) to their stack axes, such as
        `{"blocks": 0}`.
      num_layers: number of blocks that learn at a time.
      hold: number of steps for which they learn.

    Returns:
      A `Policy`.

    Raises:
      ValueError: if neither `blocks` nor `stack` is given.

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> blocks, head = {"kernel": jnp.ones((12, 4, 4))}, {"kernel": jnp.ones((4, 2))}
      >>> params = {"blocks": blocks, "head": head}
      >>> policy = cdb_jax.presets.lisa(key=0, exempt=("head",), stack={"blocks": 0})
      >>> state = cdb_jax.compact(optax.adamw(1e-3), policy).init(params)
      >>> jax.tree.map(jnp.shape, state.inner_state[0].mu)
      {'blocks': {'kernel': (2, 4, 4)}, 'head': {'kernel': (4, 2)}}

    References:
      LISA, `arXiv 2403.17919 <https://arxiv.org/abs/2403.17919>`_.
    """
    channel_axes = _whole_layers(stack)
    blocks = (*check_patterns("blocks", blocks), *(stack or {}))
    if not blocks:
        raise ValueError(
            "blocks and stack are empty, so there are no blocks to pick from; pass "
            "blocks=('blocks/*',) for unrolled blocks or stack={'blocks': 0} for stacked ones."
        )
    return Policy(
        0.0,
        key=key,
        channel_axes=channel_axes,
        layer_choice="exact",
        num_layers=num_layers,
        other_layers="frozen",
        blocks=blocks,
        exempt=exempt,
        hold=hold,
    )


def badam(
    *,
    key: Key,
    exempt: tuple[str, ...] = (),
    blocks: tuple[str, ...] = (),
    stack: Mapping[str, int | tuple[int, ...]] | None = None,
    hold: int = 100,
) -> Policy:
    """One block learns at a time, as in BAdam; with `compact`, only it has optimizer state.

    This is `lisa` with a single block. Leaves outside the blocks, such as embeddings and the head,
    count as blocks too unless they are `exempt`. The paper restarts the optimizer at each switch:
    use `on_switch="reset"`. Blocks are drawn independently; we could not confirm the order and the
    number of steps that the paper uses.

    Args:
      key, blocks, stack: as in `lisa`.
      exempt: path patterns of leaves that always learn.
      hold: number of steps for which a block learns.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax, optax
      >>> policy = cdb_jax.presets.badam(key=0, stack={"blocks": 0}, hold=50)
      >>> tx = cdb_jax.compact(optax.adamw(1e-3), policy, on_switch="reset")

    References:
      BAdam, `arXiv 2404.02827 <https://arxiv.org/abs/2404.02827>`_.
    """
    return lisa(key=key, exempt=exempt, blocks=blocks, stack=stack, num_layers=1, hold=hold)


def _whole_layers(stack: Mapping[str, int | tuple[int, ...]] | None) -> channels.ChannelAxes:
    """Every leaf as one channel, or one for each index of a stack."""
    if stack is not None and not isinstance(stack, Mapping):
        raise TypeError(f"stack must be a dict from path to axes, got {stack!r}.")
    if stack and "" in stack:
        raise ValueError(
            "stack has the path '', which is the whole tree; name the part of it that stacks "
            "blocks, such as stack={'blocks': 0}."
        )
    whole = channels.Axes(())
    stacked = {path: channels.Axes((), axes) for path, axes in (stack or {}).items()}
    return {"": whole, **stacked} if stacked else whole


def algorithm_1(
    rate: Rate,
    *,
    key: Key,
    layer_weights: LayerWeights = "uniform",
    other_layers: OtherLayers = "full",
    channel_choice: ChannelChoice = "bernoulli",
    exempt: tuple[str, ...] = (),
) -> Policy:
    r"""Algorithm 1 of the paper: one layer in each step, and a random subset of its channels.

    The paper says "channels or rows", which are output channels. It does not say what happens to
    the other layers; the released code updates them in full.

    Args:
      rate: drop probability of a channel of the picked layer.
      key: as in `Policy`.
      layer_weights: how the layer is picked: "uniform", "size", or a dict from path to weight.
      other_layers: "full": the other layers learn in full. "frozen", the literal reading: only the
        kept channels of the picked layer and what is `exempt` learn.
      channel_choice: as in `Policy`; the paper does not specify it. `value_and_grad` cannot
        skip "bernoulli".
      exempt: path patterns of leaves that always learn in full and are never picked.

    Returns:
      A `Policy`.

    Examples:
      >>> import cdb_jax
      >>> policy = cdb_jax.presets.algorithm_1(0.5, key=0, other_layers="frozen")
      >>> policy.layer_choice, policy.channel_choice
      ('exact', 'bernoulli')

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_, Algorithm 1.
    """
    return Policy(
        rate,
        key=key,
        layer_choice="exact",
        layer_weights=layer_weights,
        other_layers=other_layers,
        channel_choice=channel_choice,
        exempt=exempt,
    )
