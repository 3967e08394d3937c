"""`Policy`: everything that decides which channels learn, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cdb_jax import channels

Rate = float | jax.typing.ArrayLike | Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
Key = int | tuple[int, int] | jax.typing.ArrayLike

LAYER_CHOICES = ("bernoulli", "one")
CHANNEL_CHOICES = ("bernoulli", "exact", "window")
RESCALES = ("none", "expected", "realized")
OTHER_LAYERS = ("full", "still")
LAYER_WEIGHTS = ("uniform", "size")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Policy:
    r"""Which channels learn in a step: the settings of `channel_drop_back` as a value.

    A frozen dataclass: `dataclasses.replace(policy, rate=0.5)` gives a changed copy, checked anew.
    A training loop that uses two consumers builds one policy and gives it to both, so that both
    see the same selection. It is a pytree, whose leaves are those of its settings that are JAX
    arrays. The arguments are described at `channel_drop_back`.

    Attributes:
      key: two 32-bit words of a threefry key, whatever kind of key was given: Python ints, or
        a uint32 array of shape `(2,)` if the key was traced. No buffer of the caller is kept.

    Raises:
      TypeError, ValueError: for a bad argument, with its name and value.

    Examples:
      >>> import cdb_jax
      >>> policy = cdb_jax.Policy(0.3, key=0, channel_choice="exact")
      >>> policy.rate, policy.key
      (0.3, (0, 0))
    """

    rate: Rate
    _: dataclasses.KW_ONLY
    key: Any = None
    channel_axes: channels.ChannelAxes = channels.output_channels
    layer_rate: Rate = 1.0
    layer_choice: str = "bernoulli"
    layer_weights: Any = "uniform"
    other_layers: str = "full"
    channel_choice: str = "bernoulli"
    window_groups: int | None = None
    rescale: str = "none"
    exempt: tuple[str, ...] = ()
    share_with_bias: bool = False
    hold: int = 1
    root: str = ""

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        put("rate", check_rate("rate", self.rate))
        put("layer_rate", check_rate("layer_rate", self.layer_rate))
        put("key", _check_key(self.key))
        _check_choice("layer_choice", self.layer_choice, LAYER_CHOICES)
        _check_choice("channel_choice", self.channel_choice, CHANNEL_CHOICES)
        _check_choice("rescale", self.rescale, RESCALES)
        _check_choice("other_layers", self.other_layers, OTHER_LAYERS)
        put("layer_weights", _check_weights(self.layer_weights))
        put("window_groups", _check_groups(self.window_groups))
        put("exempt", _check_exempt(self.exempt))
        put("hold", _check_hold(self.hold))
        _check_channel_axes(self.channel_axes)
        put("channel_axes", channels.as_specs(self.channel_axes))
        if not isinstance(self.share_with_bias, bool):
            raise TypeError(f"share_with_bias must be a bool, got {self.share_with_bias!r}.")
        if not isinstance(self.root, str):
            raise TypeError(f"root must be a path such as 'encoder/blocks', got {self.root!r}.")
        put("root", self.root.strip("/"))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.rescale == "realized" and isinstance(self.rate, float) and self.rate == 1.0:
            raise ValueError(
                "rescale='realized' divides by the fraction of channels kept, and rate=1.0 "
                "keeps none; use rescale='expected' or 'none'."
            )
        if self.share_with_bias and self.channel_axes is channels.input_channels:
            raise ValueError(
                "share_with_bias=True needs channels that a bias has too, and a bias has no input "
                "channels; use channel_axes=output_channels, or share_with_bias=False."
            )
        if self.layer_choice != "one":
            for name, default in (("layer_weights", "uniform"), ("other_layers", "full")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has a meaning only with "
                        f"layer_choice='one', got layer_choice={self.layer_choice!r}."
                    )
        if self.window_groups is not None and self.channel_choice != "window":
            raise ValueError(
                f"window_groups={self.window_groups} has a meaning only with "
                f"channel_choice='window', got channel_choice={self.channel_choice!r}."
            )

    def tree_flatten(self) -> tuple[list[jax.Array], Any]:
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        arrays = {name: x for name, x in fields if isinstance(x, jax.Array)}
        return list(arrays.values()), (
            tuple(arrays),
            tuple(x for x in fields if x[0] not in arrays),
        )

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Sequence[Any]) -> Policy:
        policy = object.__new__(cls)  # JAX may put anything in place of the arrays.
        names, others = static
        for name, x in (*zip(names, arrays, strict=True), *others):
            object.__setattr__(policy, name, x)
        return policy

    @property
    def others_stand_still(self) -> bool:
        """Whether one layer learns in a step, and nothing else that is not exempt."""
        return self.layer_choice == "one" and self.other_layers == "still"

    @property
    def drops_nothing(self) -> bool:
        """Whether it is known beforehand that every channel learns in full in every step."""
        rates = (self.rate, self.layer_rate)
        return not self.others_stand_still and any(isinstance(x, float) and x == 0.0 for x in rates)

    def layout(self, updates: Any) -> channels.Layout:
        """Finds the layers of `updates` under this policy; see `cdb_jax.channels.resolve`."""
        return channels.resolve(
            updates,
            self.channel_axes,
            exempt=self.exempt,
            share_with_bias=self.share_with_bias,
            root=self.root,
        )


def as_policy(rate: Rate | Policy, settings: Mapping[str, Any]) -> Policy:
    """Returns the policy itself, or the one that `rate` and `settings` describe."""
    if isinstance(rate, optax.GradientTransformation):
        raise TypeError(
            "rate is an optax transformation; give the Policy that describes the mask, such as "
            "cdb_jax.Policy(0.3, key=0), instead of what was made of it."
        )
    if not isinstance(rate, Policy):
        _check_names(settings)
        return Policy(rate, **settings)
    defaults = {field.name: field.default for field in dataclasses.fields(Policy)}
    _check_names(settings)
    for name, value in settings.items():
        default = defaults[name]
        if type(value) is not type(default) or value != default:
            raise TypeError(
                f"{name}={value!r} was given beside a Policy; put it into the policy: "
                f"dataclasses.replace(policy, {name}=...). optax.inject_hyperparams gives every "
                "number as an argument: give it the rate and the settings, and no Policy."
            )
    return rate


def second_argument(policy: Policy | Rate | None, settings: Mapping[str, Any]) -> Policy:
    """`as_policy` for functions that take a policy, or its rate, after what they transform."""
    if policy is None:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise TypeError(
            f"policy is missing{' beside ' * bool(given)}{given}: the second argument is a Policy, "
            "or its rate without a name, as in value_and_grad(fun, 0.5, key=0)."
        )
    return as_policy(policy, settings)


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Policy)]
    for name, value in settings.items():
        if name == "settings":
            raise TypeError(
                f"settings={value!r}: optax.inject_hyperparams does not pass on arguments by name. "
                "Give it a function that has the numbers to inject as arguments of its own: "
                "optax.inject_hyperparams(lambda rate: cdb_jax.freeze_dropped(inner, "
                "cdb_jax.Policy(rate, key=0)))(rate=0.5)."
            )
        if name not in known:
            raise TypeError(f"{name}={value!r}: Policy has no argument called {name}.")


def require_policy(policy: Any) -> Policy:
    """The policy itself, where a rate alone would leave the key unsaid."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a cdb_jax.Policy, got {textwrap.shorten(repr(policy), 80)}; write "
            "Policy(0.3, key=0), say, and give the same one to everything that uses it, in its "
            "place among the arguments."
        )
    return policy


def check_rate(name: str, rate: Any, *, schedule: bool = True) -> Any:
    """Python and NumPy numbers become floats; schedules and JAX arrays stay what they are."""
    if callable(rate) and schedule:
        return rate
    if isinstance(rate, jax.Array):
        if rate.shape != () or not jnp.issubdtype(rate.dtype, jnp.number):
            raise TypeError(
                f"{name} must be a scalar, got an array of shape {rate.shape} and dtype "
                f"{rate.dtype}; use jax.vmap for several rates."
            )
        if not isinstance(rate, jax.core.Tracer):
            check_rate(name, float(rate))
        return rate
    if isinstance(rate, np.ndarray) and rate.shape == ():
        rate = rate.item()
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(
            f"{name} must be a drop probability: a number, {'an optax schedule ' * schedule}or a "
            f"scalar array, got {rate!r}."
        )
    if not 0.0 <= float(rate) <= 1.0:  # False for NaN too.
        raise ValueError(
            f"{name} must be a drop probability between 0 and 1, got {rate!r}; to drop 30 % give "
            "0.3, to keep 30 % 0.7."
        )
    return float(rate)


def check_call_key(key: Any, source: str) -> jax.Array:
    """The key of a function that draws once; `source` is where users get one."""
    if key is None:
        raise TypeError(f"key is missing: give a JAX key for this call, such as {source}.")
    is_key = isinstance(key, (jax.Array, np.ndarray)) and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise TypeError(f"key must be a JAX key, got {key!r}; use jax.random.key(0).")
    return key


def _check_key(key: Any) -> tuple[int, int] | jax.Array:
    """Brings any key down to the two words of one threefry key.

    Concrete keys are copied to the host, so that no buffer of the caller is held that donation
    could delete, and no array that `jit` would have to close over.
    """
    if key is None:
        raise TypeError(
            "key is missing: give an int or a JAX key, such as key=0 or key=jax.random.key(0). "
            "The same key draws the same channels again after a restart."
        )
    if isinstance(key, tuple) and len(key) == 2 and all(isinstance(word, int) for word in key):
        return key  # The words of another policy.
    if isinstance(key, (jax.Array, np.ndarray)):
        if isinstance(key, jax.core.Tracer):
            return _threefry_words(key)
        with jax.ensure_compile_time_eval():
            high, low = np.asarray(_threefry_words(key)).tolist()
        return high, low
    try:
        seed = None if isinstance(key, bool) else operator.index(key)
    except TypeError:
        seed = None
    if seed is None:
        raise TypeError(
            f"key must be an int or a JAX key, got {key!r}; use key=0 or key=jax.random.key(0)."
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"key={seed} is not in [0, 2**64); use a seed in that range.")
    return seed >> 32, seed & 0xFFFFFFFF


def _threefry_words(key: jax.Array | np.ndarray) -> jax.Array:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise TypeError(
                f"key must be one key, got an array of keys of shape {key.shape}; use jax.vmap for "
                "several, or index it."
            )
        words = jnp.ravel(jax.random.key_data(key))
    elif jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ():
        seed = jnp.asarray(key)  # A Python int that passed through `inject_hyperparams`.
        high = seed >> 32 if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
        words = jnp.stack([high.astype(jnp.uint32), seed.astype(jnp.uint32)])
    elif key.dtype == jnp.uint32 and key.ndim == 1 and key.size >= 2:
        words = jnp.asarray(key)  # A legacy `jax.random.PRNGKey`.
    else:
        raise TypeError(
            f"key must be an int or a JAX key, got an array of shape {key.shape} and dtype "
            f"{key.dtype}; use key=0 or key=jax.random.key(0)."
        )
    reduced = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for i in range(2, words.size):
        reduced = jax.random.fold_in(reduced, words[i])
    return jax.random.key_data(reduced)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_weights(weights: Any) -> Any:
    """A mapping becomes sorted pairs, so that a policy stays hashable."""
    if isinstance(weights, str):
        _check_choice("layer_weights", weights, LAYER_WEIGHTS)
        return weights
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


def _check_groups(groups: Any) -> int | None:
    if groups is None:
        return None
    if isinstance(groups, jax.Array):
        raise TypeError(
            "window_groups must be static, got an array; under inject_hyperparams name "
            'it in static_args=("window_groups",).'
        )
    if isinstance(groups, bool) or not isinstance(groups, numbers.Integral) or groups < 1:
        raise ValueError(f"window_groups must be an int >= 1, got {groups!r}.")
    return int(groups)


def _check_hold(steps: Any) -> Any:
    if isinstance(steps, jax.Array) and jnp.issubdtype(steps.dtype, jnp.integer):
        return steps  # A Python int that passed through `inject_hyperparams`.
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"hold must be a number of steps, an int >= 1, got {steps!r}.")
    return int(steps)


def _check_exempt(exempt: Any) -> tuple[str, ...]:
    if isinstance(exempt, str):
        raise TypeError(f"exempt must be a tuple of path patterns; write exempt=({exempt!r},).")
    patterns = tuple(exempt)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"exempt must hold path patterns such as 'head' or '*/stem', got {pattern!r}."
            )
    return patterns


def _check_channel_axes(channel_axes: Any) -> None:
    if isinstance(channel_axes, jax.Array):
        raise TypeError(
            "channel_axes must be static, got an array; under inject_hyperparams name it in "
            'static_args=("channel_axes",).'
        )
    if isinstance(channel_axes, (str, bool, float)):
        raise TypeError(
            f"channel_axes must be output_channels, input_channels, an int, a tuple of ints, Axes, "
            f"a tree of those or a rule (path, leaf) -> spec, got {channel_axes!r}."
        )
