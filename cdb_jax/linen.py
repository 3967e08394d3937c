"""For Flax Linen: the layers `Backdrop`, `DropPath` and `DropBackward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift

from cdb_jax._checks import check_bool, check_branch, check_call_rate, is_exactly, short
from cdb_jax.backdrop import backdrop
from cdb_jax.drop_backward import drop_backward
from cdb_jax.drop_path_subset import drop_path_subset
from cdb_jax.stochastic_depth import drop_path, in_evaluation


class Backdrop(nn.Module):
    """`cdb_jax.backdrop` as a layer: the identity, but it masks the gradient in training.

    Attributes:
      rate: probability that an entry of the mask is dropped.
      axes: the axis or axes along which the mask varies.
      sample_axes: axes along which masks are independent.
      deterministic: whether the layer is in evaluation mode; you can pass it in the call instead.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"backdrop": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> layer = cdb_jax.linen.Backdrop(0.5, axes=1, deterministic=False)
      >>> def loss(x):
      ...     return jnp.sum(layer.apply({}, x, rngs={"backdrop": jax.random.key(0)}))
      >>> jax.grad(loss)(jnp.ones((1, 4)))
      Array([[2., 0., 0., 2.]], dtype=float32)
    """

    rate: float
    axes: int | Sequence[int]
    sample_axes: int | Sequence[int] = ()
    deterministic: bool | None = None
    rng_collection: str = "backdrop"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deterministic: bool | None = None,
        mask: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Returns `x`. For diagnosis, `mask` replaces the random mask, even in evaluation mode."""
        if mask is None and nn.merge_param("deterministic", self.deterministic, deterministic):
            return x
        rate = check_call_rate(self.rate)
        needs_key = mask is None and not is_exactly(rate, 0.0)
        key = self.make_rng(self.rng_collection) if needs_key else None
        return backdrop(x, rate, key=key, mask=mask, axes=self.axes, sample_axes=self.sample_axes)


class DropPath(nn.Module):
    """`cdb_jax.drop_path` as a layer: drops a residual branch in training.

    Attributes:
      rate: probability that the branch is dropped.
      sample_axis: the axis of the samples, or None to drop the whole batch at once.
      scale_by_keep: whether to divide by `1 - rate` in training. If not, the layer multiplies by
        `1 - rate` in evaluation, as the original paper does (timm does not).
      deterministic: whether the layer is in evaluation mode; you can pass it in the call instead.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"drop_path": key})`.

    Examples:
      >>> import cdb_jax.linen, jax, jax.numpy as jnp
      >>> drop = cdb_jax.linen.DropPath(0.5)
      >>> drop.apply({}, jnp.ones((4, 1)), False, rngs={"drop_path": jax.random.key(0)})
      Array([[2.],
             [0.],
             [0.],
             [2.]], dtype=float32)
    """

    rate: float
    sample_axis: int | None = 0
    scale_by_keep: bool = True
    deterministic: bool | None = None
    rng_collection: str = "drop_path"

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Returns `x`, the output of a branch, or zeros if it is dropped."""
        rate = check_call_rate(self.rate)
        scaling = check_bool("scale_by_keep", self.scale_by_keep)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return in_evaluation(x, rate, scaling)
        key = None if is_exactly(rate, 0.0) else self.make_rng(self.rng_collection)
        return drop_path(x, rate, key=key, sample_axis=self.sample_axis, scale_by_keep=scaling)

    def subset(
        self,
        branch: Callable[..., jax.Array],
        *args: Any,
        num_shards: int = 1,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """`cdb_jax.drop_path_subset`: computes the branch for a fixed number of random samples.

        Batch normalisation in the branch sees these samples only.

        Args:
          branch: a module, or a function of arrays that may call modules.
          *args: arrays of samples; the branch gets only the kept samples.
          num_shards: the number of devices that share the batch.
          deterministic: as in a call.

        Raises:
          ValueError: if `sample_axis` is None.
        """
        check_branch(branch, "drop.subset(branch, x)")
        if self.sample_axis is None:
            raise ValueError(
                "sample_axis=None: subset() needs the axis of the samples; use sample_axis=0."
            )
        rate = check_call_rate(self.rate)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return in_evaluation(branch(*args), rate, self.scale_by_keep)
        key = None if is_exactly(rate, 0.0) else self.make_rng(self.rng_collection)
        return drop_path_subset(
            branch,
            *args,
            rate=self.rate,
            key=key,
            sample_axis=self.sample_axis,
            num_shards=num_shards,
            scale_by_keep=self.scale_by_keep,
        )


class DropBackward(nn.Module):
    """`cdb_jax.drop_backward` as a layer: drops the backward pass of a branch in training.

    Attributes:
      rate: probability that the backward pass is dropped.
      scale_by_keep: whether to divide the gradient of a kept branch by `1 - rate`.
      deterministic: whether the layer is in evaluation mode; you can pass it in the call instead.
      rng_collection: name of the stream of keys: `model.apply(..., rngs={"drop_backward": key})`.

    Examples:
      >>> import cdb_jax.linen, flax.linen as nn, jax, jax.numpy as jnp
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         drop = cdb_jax.linen.DropBackward(0.5)
      ...         return x + drop(nn.Dense(2), x, deterministic=not train)
      >>> model, x = Block(), jnp.ones((1, 2))
      >>> params = model.init(jax.random.key(0), x, False)
      >>> def loss(params, seed):
      ...     rngs = {"drop_backward": jax.random.key(seed)}
      ...     return jnp.sum(model.apply(params, x, True, rngs=rngs))
      >>> [jax.grad(loss)(params, seed)["params"]["Dense_0"]["bias"] for seed in (0, 1)]
      [Array([1., 1.], dtype=float32), Array([0., 0.], dtype=float32)]
    """

    rate: float
    scale_by_keep: bool = False
    deterministic: bool | None = None
    rng_collection: str = "drop_backward"

    @nn.compact
    def __call__(
        self,
        branch: Callable[..., Any],
        *args: Any,
        kept: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Returns `branch(*args)`.

        Variables, such as batch statistics, are updated as if the layer were not there.

        Args:
          branch: a module, a method of a module such as `self.attend`, or a function whose first
            argument is a module, such as `self`; it may call submodules, and create them.
          *args: arguments of the branch: arrays and settings. If the branch is a function, pass its
            module first.
          kept: a bool scalar that decides whether to keep the backward pass, instead of a draw;
            usually an entry of the result of `kept_branches`. It is ignored in evaluation mode.
          deterministic: whether the layer is in evaluation mode.
        """
        function, module, args = _with_module(branch, args)
        rate = check_call_rate(self.rate)
        is_evaluating = nn.merge_param("deterministic", self.deterministic, deterministic)
        is_plain = is_evaluating or module.is_initializing()
        key = None
        if not is_plain and kept is None and not is_exactly(rate, 0.0):
            key = self.make_rng(self.rng_collection)
        settings: Any = dict(rate=rate, key=key, kept=kept, scale_by_keep=self.scale_by_keep)

        def lifted(function: Callable[..., Any], scope: Any, *args: Any) -> Any:
            def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any) -> Any:
                def pure(variables: Any, *args: Any) -> Any:
                    scope = scope_fn(variables, rngs)
                    results = function(scope, *args)
                    return results, repack_fn(scope)

                if is_plain:
                    return pure(variables, *args)
                return drop_backward(pure, variables, *args, **settings)

            return lift.pack(inner, (True,), (True,), (True,), name="drop_backward")(scope)

        return nn.transforms.lift_direct_transform(lifted, (function,), module, *args)


def _with_module(
    branch: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], nn.Module, tuple[Any, ...]]:
    """A branch as a function of a module, and of other arguments."""
    if isinstance(branch, nn.Module):
        return type(branch).__call__, branch, args
    owner = getattr(branch, "__self__", None)
    if inspect.ismethod(branch) and isinstance(owner, nn.Module):
        return branch.__func__, owner, args
    if not args or not isinstance(args[0], nn.Module):
        raise TypeError(
            f"branch must be a module, a method of one, or a function whose first argument is one, "
            f"got {short(branch)}; use drop(self.attend, x) or drop(function, self, x)."
        )
    return branch, args[0], args[1:]
