"""`channel_report`: what a policy will do to a model, as a readable table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cdb_jax import _draw, channels
from cdb_jax._checks import check_no_module, parameters_of, short
from cdb_jax._optax_states import check_supported
from cdb_jax._skipping.explain import Explained, explain
from cdb_jax.compact import check_policy_fits, compact
from cdb_jax.policy import Policy, check_policy


class ChannelRow(NamedTuple):
    """One leaf of the tree.

    Attributes:
      path, shape, channel_axes, stack_axes, channels: as in the layout; `channels` is None if the
        leaf has none.
      kept: the number of channels that learn when the layer is masked; a tilde marks an average.
      note: why the leaf has no channels, which kernel a bias follows, or how a convention found the
        channels.
      gradient: how `value_and_grad` computes its gradient; empty without a loss function.
    """

    path: str
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    channels: int | None
    kept: str
    note: str
    gradient: str = ""


class Amount(NamedTuple):
    """What a step needs in full, and without what the policy drops.

    `kept` is None if the policy does not determine it: for work, if a rate is a schedule or an
    array; for memory, if the number of channels that learn varies.
    """

    full: float
    kept: float | None


class Savings(NamedTuple):
    """What a policy saves.

    Attributes:
      flops: floating-point operations of the weight gradients of a step, on average, with
        `value_and_grad`; None without a loss function.
      gradient_bytes: size of the gradient; smaller with `value_and_grad(..., kept_only=True)`.
      state_bytes: size of the optimizer state; smaller with `compact`. None without an optimizer.
      obstacle: why the policy does not fit `compact`; empty if it does.
    """

    flops: Amount | None
    gradient_bytes: Amount
    state_bytes: Amount | None
    obstacle: str = ""

    def __str__(self) -> str:
        lines = []
        if self.flops:
            lines.append(_line("weight gradients", self.flops, "FLOP", "value_and_grad"))
        lines.append(_line("gradient", self.gradient_bytes, "B", "kept_only=True"))
        if self.state_bytes:
            lines.append(_line("optimizer state", self.state_bytes, "B", "compact"))
            if self.obstacle:
                lines.append(f"compact cannot be used: {self.obstacle}")
        return "\n".join(lines)


def _line(noun: str, amount: Amount, unit: str, function: str) -> str:
    full = f"{noun}: {_readable(amount.full)}{unit}"
    if amount.kept is None:
        return full
    share = 100 * amount.kept / max(amount.full, 1)
    return f"{full}; with {function}: {_readable(amount.kept)}{unit} ({share:.0f} %)"


def _readable(number: float) -> str:
    """Three digits and the prefix of a unit, such as 24.3 M."""
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    return f"{number:.3g} {prefixes[0]}"


class ChannelReport(NamedTuple):
    """The rows of a report, and what the policy saves; print it to see a table."""

    rows: tuple[ChannelRow, ...]
    summary: str
    savings: Savings

    @property
    def cells(self) -> list[list[str]]:
        """The table as text: its headings, and then one line for each leaf."""
        header = ["path", "shape", "channel axis", "stack axis", "channels", "kept", "note"]
        if any(row.gradient for row in self.rows):
            header.append("gradient")
        cells = [
            [
                row.path or "(the tree itself)",
                "x".join(map(str, row.shape)) or "scalar",
                ", ".join(map(str, row.channel_axes)) or "-",
                ", ".join(map(str, row.stack_axes)) or "-",
                "-" if row.channels is None else str(row.channels),
                row.kept,
                row.note,
                row.gradient,
            ][: len(header)]
            for row in self.rows
        ]
        return [header, *cells]

    def __str__(self) -> str:
        header, *lines = self.cells
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, ["-" * width for width in widths], *lines)
        ]
        return "\n".join([*table, self.summary, str(self.savings)])


def channel_report(
    params: Any,
    policy: Policy,
    fun: Callable[..., Any] | None = None,
    *args: Any,
    optimizer: optax.GradientTransformation | None = None,
    **kwargs: Any,
) -> ChannelReport:
    """Shows which axes of each leaf hold its channels, or why it has none, and what a policy saves.

    With a loss function, it also shows how `cdb_jax.value_and_grad` computes each gradient: "in
    full", "skipped" (the dropped part is not computed), "masked only" (it is computed and then set
    to zero), followed by the reason, or "none: frozen".

    Args:
      params: the parameters as the optimizer gets them: a tree of arrays or `jax.ShapeDtypeStruct`.
        For a Flax NNX model, its `nnx.Param` variables are used; to pass its loss as well, use
        `cdb_jax.nnx.channel_report`.
      policy: the policy to explain.
      fun: a loss function `fun(params, *args, **kwargs)`, which may return a pair with auxiliary
        data. It is traced, not run.
      *args: other arguments of `fun`; arrays may be of type `jax.ShapeDtypeStruct`.
      optimizer: the optimizer that would be inside `compact`, to show the size of its state.
      **kwargs: other arguments of `fun`, by name.

    Returns:
      A report with one row for each leaf.

    Raises:
      TypeError, ValueError: as in training, for a policy that does not fit the tree or, with `fun`,
        for a bad `fun`, or channel axes that contradict how it uses the weights. A policy that
        cannot skip anything does not raise: the report then shows "masked only".

    Examples:
      >>> import cdb_jax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}}
      >>> print(cdb_jax.channel_report(params, cdb_jax.Policy(0.5, key=0, channel_choice="exact")))
      path          shape  channel axis  stack axis  channels  kept  note
      ------------  -----  ------------  ----------  --------  ----  -------------------------
      dense/bias    4      -             -           -         all   fewer than two dimensions
      dense/kernel  2x4    1             -           4         2
      1 layer, 66.7 % of 12 parameters can be dropped; layer_rate 1.0, rate 0.5, exact channels.
      gradient: 48 B; with kept_only=True: 32 B (67 %)

      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> loss = lambda params, x: jnp.sum(x @ params["dense"]["kernel"])
      >>> x = jax.ShapeDtypeStruct((8, 2), jnp.float32)
      >>> report = cdb_jax.channel_report(params, policy, loss, x, optimizer=optax.adam(0.1))
      >>> [row.gradient for row in report.rows]
      ['in full', 'skipped']
      >>> report.savings.state_bytes
      Amount(full=100, kept=68)
    """
    if isinstance(fun, optax.GradientTransformation):
        raise TypeError("fun is an optimizer; pass it by name: optimizer=optax.adamw(1e-3).")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"{_OPTIMIZER}, got {short(optimizer)}.")
    if fun is not None:
        check_no_module(params, "params is", "cdb_jax.nnx.channel_report")
    params = parameters_of(params)
    layout = check_policy(policy).layout(params)
    _draw.check_layers(policy, layout)
    rows = [_row(leaf, policy) for leaf in layout.leaves]
    flops = None
    if fun is not None:
        # Only static parts of the selection are read.
        selection = jax.eval_shape(lambda: policy.select(params, 0))
        gradients = explain(fun, params, args, kwargs, selection)
        rows = [row._replace(gradient=x.text) for row, x in zip(rows, gradients, strict=True)]
        flops = _flops(policy, layout, gradients)
    types = jax.tree.map(_type, params)
    savings = Savings(flops, *_memory(policy, types, optimizer))
    return ChannelReport(tuple(rows), _summary(layout, policy), savings)


def _flops(policy: Policy, layout: channels.Layout, gradients: Sequence[Explained]) -> Amount:
    """The weight gradients of an average step."""
    shares = _draw.expected_shares(policy, layout)
    pairs = [
        (x.flops, shares.get(leaf.source, 0.0) if x.is_skipped else 1.0)
        for leaf, x in zip(layout.leaves, gradients, strict=True)
    ]
    known = [n * share for n, share in pairs if share is not None]
    full = sum(n for n, _ in pairs)
    return Amount(full, round(sum(known)) if len(known) == len(pairs) else None)


def _memory(
    policy: Policy, params: Any, optimizer: optax.GradientTransformation | None
) -> tuple[Amount, Amount | None, str]:
    """The sizes of the gradient and of the optimizer state, and why they cannot be smaller."""
    obstacle = ""
    try:
        check_policy_fits(policy)
    except (TypeError, ValueError) as error:
        obstacle = str(error)

    def sizes(tx: optax.GradientTransformation) -> Amount:
        state = jax.eval_shape(tx.init, params)
        check_supported(state, "compact")
        if obstacle:
            return Amount(_bytes(state), None)
        kept = jax.eval_shape(compact(tx, policy).init, params).inner_state
        return Amount(_bytes(state), _bytes(kept))

    return sizes(_GRADIENT), None if optimizer is None else sizes(optimizer), obstacle


_OPTIMIZER = "optimizer must be the one that would be inside compact, such as optax.adamw(1e-3)"
# Its state is as large as the gradient.
_GRADIENT = optax.GradientTransformation(lambda params: params, lambda g, state, _: (g, state))


def _type(x: Any) -> jax.ShapeDtypeStruct | None:
    """The type of an array or a number; None for anything else, such as a function."""
    if isinstance(x, (int, float, complex)):
        return jax.ShapeDtypeStruct((), jnp.result_type(x))
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else None


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _row(leaf: channels.Leaf, policy: Policy) -> ChannelRow:
    if leaf.reason:
        return ChannelRow(leaf.path, leaf.shape, (), (), None, "all", leaf.reason.value)
    note = "" if leaf.layer == leaf.path else f"follows {leaf.layer}"
    if leaf.is_default:
        is_output = leaf.convention == channels.output_channels
        note = f"the {'last' if is_output else 'second-to-last'} axis, by default"
    elif leaf.convention and policy.channel_axes != leaf.convention:
        note = "by name and shape"  # Among specs that say more, such as inferred ones.
    kept = _kept(policy, leaf.channels)
    return ChannelRow(leaf.path, leaf.shape, leaf.channel, leaf.stack, leaf.channels, kept, note)


def _kept(policy: Policy, width: int) -> str:
    if not isinstance(policy.rate, float):
        return "scheduled" if callable(policy.rate) else "an array"
    if policy.rate == 0.0:
        return str(width)
    if policy.channel_choice == "bernoulli":  # If all would be dropped, none is.
        spared = policy.rate**width if policy.rate < 1.0 else 0.0
        return f"~{(1.0 - policy.rate + spared) * width:.3g}"
    groups = policy.window_groups or 1
    return str(groups * int(_draw.num_kept(policy.rate, width // groups)))


def _summary(layout: channels.Layout, policy: Policy) -> str:
    layers = sum(layer.depth for layer in layout.layers)
    total = sum(leaf.size for leaf in layout.leaves)
    droppable = sum(leaf.size for leaf in layout.leaves if leaf.layer is not None)
    rate, layer_rate = (
        str(x) if isinstance(x, float) else "scheduled" if callable(x) else "an array"
        for x in (policy.rate, policy.layer_rate)
    )
    picked = ""
    if policy.layer_choice == "exact":
        noun = "blocks" if policy.blocks else "layers"
        # For a part of a model, the total is unknown.
        total_layers = sum(_draw.depth_of_blocks(policy, layout.layers).values())
        picked = f"{noun} a step: {policy.layers_picked}"
        picked += ", " if layout.partial else f" of {total_layers}, "
    what = f"rate {rate}, {policy.channel_choice} channels"
    if isinstance(policy.rate, float) and policy.rate == 0.0:
        what = "all channels"
    noun = "layer" if layers == 1 else "layers"
    return (
        f"{layers} {noun}, {100 * droppable / max(total, 1):.1f} % of "
        f"{total:,} parameters can be dropped; {picked}layer_rate {layer_rate}, {what}."
    )
