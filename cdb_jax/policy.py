"""`Policy`: everything that decides which channels learn, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cdb_jax import _draw, channels
from cdb_jax._checks import (
    check_choice,
    check_patterns,
    check_policy_key,
    check_positive,
    check_rate,
    check_step,
    parameters_of,
    short,
)
from cdb_jax.selection import Selection

Rate = float | jax.typing.ArrayLike | Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
Key = int | tuple[int, int] | jax.typing.ArrayLike
LayerChoice = Literal["bernoulli", "exact"]
LayerWeights = Literal["uniform", "size"] | Mapping[str, float] | tuple[tuple[str, float], ...]
OtherLayers = Literal["full", "frozen"]
ChannelChoice = Literal["bernoulli", "exact", "window", "chunk"]
Rescale = Literal["none", "expected", "realized"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Policy:
    r"""Which channels may be dropped, how often, and how they are chosen.

    Equal policies draw the same channels at the same step, wherever they are used. A policy is a
    frozen dataclass, so `dataclasses.replace(policy, rate=0.5)` returns a changed copy. It is also
    a pytree whose leaves are the settings that are JAX arrays.

    In each step, each layer is masked with probability `layer_rate`, and each channel of a masked
    layer is dropped with probability `rate`. If that would drop every channel of a layer, none is
    dropped, unless `rate=1`.

    Args:
      rate: probability that a channel of a masked layer is dropped, in [0, 1]: a number, an optax
        schedule of the step, or a scalar array, which may be traced. With `rate=1`, a masked layer
        is frozen.
      key: an int or a JAX key. Required. The same key and step give the same selection, on every
        device and after any restart.
      channel_axes: which axes hold the channels: `output_channels` or `input_channels`, which know
        the names that Flax and Equinox use; an int or tuple for every leaf with two or more
        dimensions; `Axes`; a tree of these that is a prefix of the parameters, where None leaves a
        leaf alone; or a rule `(path, leaf)` that returns one of these.
      layer_rate: probability that a layer is masked in a step: a number, a schedule or a scalar
        array. The other layers learn in full.
      layer_choice: "bernoulli" decides for each layer independently; "exact" picks `num_layers`
        layers per step and masks each with probability `layer_rate`.
      num_layers: how many layers "exact" picks. By default one, as in Algorithm 1 of the paper.
      layer_weights: how "exact" picks a single layer: "uniform", "size" (in proportion to the
        number of parameters), or a dict from path to weight.
      other_layers: with "exact", whether the other layers learn in "full" or are "frozen", together
        with every leaf that is not `exempt`, including biases and normalisation.
      blocks: path patterns of blocks, such as `("encoder/layers/*",)`. All layers below a
        matching path are masked or picked together, as one layer; stacked layers are grouped by
        their index in the stack. If several patterns match a layer, the first one applies.
      channel_choice: how the channels of a masked layer are chosen. "bernoulli" decides for each
        channel independently; "exact" keeps a fixed number k of channels, and all subsets are
        equally likely; "window" keeps a contiguous block of k that wraps around; "chunk"
        splits the channels into m equal chunks and keeps one, for a rate of :math:`1 - 1/m` such as
        0.5 or 0.75, and a window in layers whose channels m does not divide. Here
        :math:`k = \max(1, \mathrm{round}((1 - \mathrm{rate})\, C))` of C channels, and 0 for
        `rate=1`. If the rate is an array or a schedule, k may differ by one.
      window_groups: number g of equal groups of channels for "window" and "chunk"; it must divide
        C. Every group keeps the same window or chunk, whose size is k with C/g in place of C.
      rescale: what `channel_drop_back` divides the kept channels by. "none"; "expected", the
        probability that a channel of a masked layer learns: k/C, or :math:`1 - r + r^C` for
        "bernoulli" with rate r (the last term comes from layers that would lose every channel), and
        the probability that a layer learns if `rate=1`; "realized", the fraction kept in this
        step, as in the released code.
      exempt: path patterns such as `("head", "*/stem/kernel")` of leaves that are never dropped. A
        pattern also covers everything below what it matches.
      only: the opposite of `exempt`: if given, only leaves under these patterns can be dropped.
      share_with_bias: whether the `bias` of a layer is dropped with its kernel; otherwise it always
        learns.
      hold: number of steps for which a selection is kept before the next one is drawn. If
        `channel_drop_back` follows a wrapper that makes one step of n updates, such as
        `optax.contrib.sam(..., sync_period=n)`, set `hold=n`.
      root: path of the given tree inside a larger model, so that a part of the model, such as a
        pipeline stage, draws what the whole model would draw.

    Attributes:
      key: two 32-bit words of a threefry key, whatever kind of key was given: Python ints, or a
        uint32 array of shape `(2,)` if the key was traced.

    Raises:
      TypeError, ValueError: for a bad argument.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="exact")
      >>> selection = policy.select({"kernel": jnp.ones((2, 4))}, step=7)
      >>> selection.mask({"kernel": jnp.ones((2, 4))})
      {'kernel': Array([[0., 1., 0., 1.],
             [0., 1., 0., 1.]], dtype=float32)}

    References:
      ChannelDropBack, `arXiv 2411.10891 <https://arxiv.org/abs/2411.10891>`_.
    """

    rate: Rate
    key: Key | None = None
    _: dataclasses.KW_ONLY
    channel_axes: channels.ChannelAxes = channels.output_channels
    layer_rate: Rate = 1.0
    layer_choice: LayerChoice = "bernoulli"
    num_layers: int | None = None
    layer_weights: LayerWeights = "uniform"
    other_layers: OtherLayers = "full"
    blocks: tuple[str, ...] = ()
    channel_choice: ChannelChoice = "bernoulli"
    window_groups: int | None = None
    rescale: Rescale = "none"
    exempt: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    share_with_bias: bool = False
    hold: int | jax.Array = 1
    root: str = ""
    _arrays: ClassVar[tuple[str, ...]] = ()  # The settings that are leaves of the pytree.

    def __post_init__(self) -> None:
        check_choice("layer_choice", self.layer_choice, get_args(LayerChoice))
        check_choice("other_layers", self.other_layers, get_args(OtherLayers))
        check_choice("channel_choice", self.channel_choice, get_args(ChannelChoice))
        check_choice("rescale", self.rescale, get_args(Rescale))
        if not isinstance(self.share_with_bias, bool):
            raise TypeError(f"share_with_bias must be a bool, got {self.share_with_bias!r}.")
        if not isinstance(self.root, str):
            raise TypeError(f"root must be a path such as 'encoder/blocks', got {self.root!r}.")
        checked = dict(
            rate=check_rate("rate", self.rate),
            layer_rate=check_rate("layer_rate", self.layer_rate),
            key=check_policy_key(self.key),
            layer_weights=_check_weights(self.layer_weights),
            num_layers=_check_static_int("num_layers", self.num_layers),
            window_groups=_check_static_int("window_groups", self.window_groups),
            blocks=check_patterns("blocks", self.blocks),
            exempt=check_patterns("exempt", self.exempt),
            only=None if self.only is None else check_patterns("only", self.only),
            hold=_check_hold(self.hold),
            channel_axes=channels.as_specs(self.channel_axes),
            root=self.root.strip("/"),
        )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        # Recorded by name, so that they stay leaves even if `jax.tree.map` replaces their values.
        arrays = (name for name, value in checked.items() if isinstance(value, jax.Array))
        object.__setattr__(self, "_arrays", tuple(arrays))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.rescale == "realized" and isinstance(self.rate, float) and self.rate == 1.0:
            raise ValueError(
                "rescale='realized' divides by the fraction of channels kept, but rate=1.0 keeps "
                "none; use rescale='expected' or 'none'."
            )
        if self.share_with_bias and self.channel_axes == channels.input_channels:
            raise ValueError(
                "share_with_bias=True with channel_axes=input_channels: a bias has no input "
                "channels; use channel_axes=output_channels or share_with_bias=False."
            )
        needs = (
            ("layer_weights", "uniform", "layer_choice", ("exact",)),
            ("other_layers", "full", "layer_choice", ("exact",)),
            ("num_layers", None, "layer_choice", ("exact",)),
            ("window_groups", None, "channel_choice", ("window", "chunk")),
        )
        for name, default, choice, needed in needs:
            if getattr(self, name) != default and getattr(self, choice) not in needed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs {choice}="
                    f"{' or '.join(map(repr, needed))}, got {choice}={getattr(self, choice)!r}."
                )
        is_fraction = isinstance(self.rate, float) and (
            self.rate == 1.0 or _draw.num_chunks(self.rate) is not None
        )
        if self.channel_choice == "chunk" and not is_fraction:
            raise ValueError(
                f"rate={short(self.rate)}: channel_choice='chunk' keeps one of m chunks; use a "
                "Python number 1 - 1/m, such as 0.5, 0.75 or 0.875, or channel_choice='window'."
            )
        if self.layers_picked > 1 and self.layer_weights != "uniform":
            raise ValueError(
                f"layer_weights={self.layer_weights!r} needs num_layers=1, got num_layers="
                f"{self.num_layers}; use layer_weights='uniform' to pick several layers."
            )

    def select(self, params: Any, step: jax.typing.ArrayLike) -> Selection:
        """Draws which channels learn in a step.

        Args:
          params: the parameters, their gradients or their updates. Only paths, shapes and dtypes
            are read, so `jax.ShapeDtypeStruct` leaves will do. For a Flax NNX model, its
            `nnx.Param` variables are used.
          step: an int or an integer scalar, which may be traced.

        Returns:
          A `Selection`. It depends only on the policy, the step, and these paths, shapes and
          dtypes.

        Raises:
          TypeError, ValueError: if the policy does not fit the tree, or if `step` is not an integer
            in [0, 2**32).

        Examples:
          >>> import cdb_jax, jax.numpy as jnp
          >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
          >>> policy.select({"kernel": jnp.ones((3, 4))}, step=0).factors
          {'kernel': Array([1., 0., 0., 1.], dtype=float32)}
        """
        step = check_step(step)
        return _draw.draw_once(self.layout(parameters_of(params)), self, step)

    def layout(self, params: Any) -> channels.Layout:
        """Finds the layers of a tree under this policy; see `cdb_jax.channels.resolve`."""
        return channels.resolve(
            params,
            self.channel_axes,
            exempt=self.exempt,
            only=self.only,
            share_with_bias=self.share_with_bias,
            root=self.root,
        )

    @property
    def layers_picked(self) -> int:
        """How many layers or blocks "exact" picks."""
        return self.num_layers or 1

    @property
    def freezes_others(self) -> bool:
        """Whether only the layers that are picked and the exempt leaves learn in a step."""
        return self.layer_choice == "exact" and self.other_layers == "frozen"

    @property
    def drops_nothing(self) -> bool:
        """Whether every layer is certain to learn in full in every step."""
        rates = (self.rate, self.layer_rate)
        return not self.freezes_others and any(isinstance(x, float) and x == 0.0 for x in rates)

    def draws_like(self, other: Policy) -> bool:
        """Whether two policies are equal; False if that depends on the values of tracers."""

        def are_same(x: Any, y: Any) -> bool:
            is_traced = isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer)
            return x is y or (not is_traced and bool(np.array_equal(x, y)))

        (arrays, static), (other_arrays, other_static) = self.tree_flatten(), other.tree_flatten()
        return static == other_static and all(map(are_same, arrays, other_arrays))

    def tree_flatten(self) -> tuple[list[Any], Any]:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        arrays = {name: x for name, x in fields if name in self._arrays}
        others = tuple(x for x in fields if x[0] not in arrays)
        return list(arrays.values()), (tuple(arrays), others)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Sequence[Any]) -> Policy:
        policy = object.__new__(cls)  # JAX may put anything in place of the arrays.
        names, others = static
        object.__setattr__(policy, "_arrays", names)
        for name, x in (*zip(names, arrays, strict=True), *others):
            object.__setattr__(policy, name, x)
        return policy


def check_policy(policy: Any) -> Policy:
    """Returns the policy itself; raises a TypeError for anything else."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a cdb_jax.Policy such as Policy(0.3, key=0), got {short(policy)}."
        )
    return policy


def _check_weights(weights: Any) -> LayerWeights:
    """Turns a mapping into sorted pairs, so that a policy stays hashable."""
    if isinstance(weights, str):
        check_choice("layer_weights", weights, ("uniform", "size"))
        return weights  # type: ignore[return-value]
    try:
        pairs = tuple(sorted(dict(weights).items()))
    except (TypeError, ValueError):
        raise TypeError(
            f"layer_weights must be 'uniform', 'size' or a dict from layer path to weight, got "
            f"{weights!r}."
        ) from None
    for path, weight in pairs:
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"layer_weights[{path!r}] must be a finite number >= 0, got {weight!r}."
            )
    if not sum(weight for _, weight in pairs) > 0:
        raise ValueError(f"layer_weights must have a positive sum, got {weights!r}.")
    return tuple((path, float(weight)) for path, weight in pairs)


def _check_static_int(name: str, value: Any) -> int | None:
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be static, got an array; under inject_hyperparams, list it in "
            f'static_args=("{name}",).'
        )
    return None if value is None else check_positive(name, value)


def _check_hold(hold: Any) -> int | jax.Array:
    is_array = isinstance(hold, jax.Array) and jnp.issubdtype(hold.dtype, jnp.integer)
    if not is_array or hold.shape:
        return check_positive("hold", hold)
    if not isinstance(hold, jax.core.Tracer):
        check_positive("hold", int(hold))
    return hold  # A Python int that passed through `inject_hyperparams`.
