"""For Flax NNX: `value_and_grad`, `grad`, `channel_report`, and layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import errors, nnx

from cdb_jax import inference, report
from cdb_jax._checks import check_bool, check_branch, check_call_rate, check_pair, is_exactly
from cdb_jax._skipping import api
from cdb_jax.backdrop import backdrop, check_axes
from cdb_jax.drop_backward import drop_backward
from cdb_jax.drop_path_subset import drop_path_subset
from cdb_jax.inference import InferredAxes
from cdb_jax.policy import Policy
from cdb_jax.selection import Selection
from cdb_jax.stochastic_depth import drop_path, in_evaluation, run_branch

Argnum = int | nnx.DiffState
_UPDATE = "cdb_jax.value_and_grad"  # The context in which models are updated.


def value_and_grad(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    kept_only: bool = False,
) -> Callable[..., Any]:
    """`nnx.value_and_grad` that computes only the part of the gradient that a selection keeps.

    Like `nnx.value_and_grad`, it propagates what `fun` changes in its models, such as batch
    statistics and RNG state.

    Args:
      fun: a function of models and arrays that returns a float scalar, or with `has_aux` a pair of
        such a scalar and auxiliary data.
      argnums: the position of the model, or tree of models, to differentiate; an `nnx.DiffState`
        for variables other than `nnx.Param`; or several of these.
      has_aux: whether `fun` returns a pair.
      kept_only: as in `cdb_jax.value_and_grad`.

    Returns:
      A function of the arguments of `fun` and of the keyword argument `selection`, a `Selection`
      for the model, such as `policy.select(model, step)`. It returns the value, with the auxiliary
      data if there is any, and the gradient: an `nnx.State` in place of each model.

    Raises:
      TypeError, ValueError: as for `cdb_jax.value_and_grad`, and if `fun` adds variables to a
        model.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.mean(model(x))
      >>> value, grads = cdb_jax.nnx.value_and_grad(loss)(
      ...     model, jnp.ones((3, 2)), selection=policy.select(model, 0)
      ... )
      >>> grads["kernel"][...]
      Array([[0.25, 0.  , 0.  , 0.25],
             [0.25, 0.  , 0.  , 0.25]], dtype=float32)
    """
    api.check_function(fun)
    is_single = isinstance(argnums, (int, nnx.DiffState))
    several = [argnums] if isinstance(argnums, (int, nnx.DiffState)) else list(argnums)
    wanted = [nnx.DiffState(x, nnx.Param) if isinstance(x, int) else x for x in several]

    @api.wraps(fun)
    @nnx.update_context(_UPDATE)
    def value_and_gradient(*args: Any, selection: Selection | None = None, **kwargs: Any) -> Any:
        call = _Call(args, kwargs, wanted)
        with nnx.split_context(_UPDATE) as context:
            graph, params, rest = call.split(context, call.models)

        def loss(params: Any) -> tuple[Any, Any]:
            given = (params,) if is_single else params
            with nnx.merge_context(_UPDATE, inner=True) as context:
                models = call.merge(context, graph, given, rest)
            new_args, new_kwargs = call.arguments(models)
            result = fun(*new_args, **new_kwargs)
            value, aux = check_pair(result) if has_aux else (result, None)
            with nnx.split_context(_UPDATE) as context:
                new_graph, new_params, new_rest = call.split(context, models)
            return value, (aux, new_graph, _changes(given, new_params), new_rest)

        (value, (aux, new_graph, changed, new_rest)), gradient = api.value_and_grad(
            loss, has_aux=True, kept_only=kept_only
        )(params[0] if is_single else params, selection=selection)
        with nnx.merge_context(_UPDATE, inner=False) as context:
            call.merge(context, new_graph, _filled(params, changed), new_rest)
        return ((value, aux) if has_aux else value), gradient

    return value_and_gradient


def grad(
    fun: Callable[..., Any],
    argnums: Argnum | Sequence[Argnum] = 0,
    has_aux: bool = False,
    *,
    kept_only: bool = False,
) -> Callable[..., Any]:
    """Like `value_and_grad`, but returns only the gradient.

    With `has_aux`, it returns a pair of the gradient and the auxiliary data.

    Examples:
      >>> import cdb_jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 4, use_bias=False, rngs=nnx.Rngs(0))
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> grad = nnx.jit(cdb_jax.nnx.grad(lambda model, x: model(x).sum()))
      >>> grads = grad(model, jnp.ones((3, 2)), selection=policy.select(model, 0))
      >>> grads["kernel"][...]
      Array([[3., 0., 0., 3.],
             [3., 0., 0., 3.]], dtype=float32)
    """
    return api.without_value(value_and_grad(fun, argnums, has_aux, kept_only=kept_only), has_aux)


def channel_report(
    model: nnx.Module,
    policy: Policy,
    fun: Callable[..., Any] | None = None,
    *args: Any,
    optimizer: optax.GradientTransformation | None = None,
    **kwargs: Any,
) -> report.ChannelReport:
    """`cdb_jax.channel_report` for the parameters of a model.

    Args:
      model: the model.
      policy: the policy to explain.
      fun: a loss function `fun(model, *args, **kwargs)`, which may return a pair with auxiliary
        data. It is traced, not run.
      *args: other arguments of `fun`; arrays may be of type `jax.ShapeDtypeStruct`.
      optimizer: as in `cdb_jax.channel_report`.
      **kwargs: other arguments of `fun`, by name.

    Returns:
      A report with one row for each parameter.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> policy = cdb_jax.Policy(0.5, key=0, channel_choice="window")
      >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.mean(model(x))
      >>> report = cdb_jax.nnx.channel_report(model, policy, loss, jnp.ones((3, 2)))
      >>> [(row.path, row.gradient) for row in report.rows]
      [('bias', 'in full'), ('kernel', 'skipped')]
    """
    if fun is None:
        return report.channel_report(model, policy, optimizer=optimizer)
    of_params, params = _of_parameters(fun, model)
    return report.channel_report(params, policy, of_params, *args, optimizer=optimizer, **kwargs)


def infer_channel_axes(
    fun: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    channels: Literal["output", "input"] = "output",
    **kwargs: Any,
) -> InferredAxes:
    """`cdb_jax.infer_channel_axes` for a model and a loss `fun(model, *args, **kwargs)`.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.mean(model(x))
      >>> cdb_jax.nnx.infer_channel_axes(loss, model, jnp.ones((3, 2)))
      {'bias': None, 'kernel': cdb_jax.Axes(channel=1, stack=())}
    """
    of_params, params = _of_parameters(fun, model)
    return inference.infer_channel_axes(of_params, params, *args, channels=channels, **kwargs)


def _of_parameters(fun: Callable[..., Any], model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """A loss as a function of the parameters of a model, and these parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def of_params(params: Any, *args: Any, **kwargs: Any) -> Any:
        return fun(nnx.merge(graph, params, rest, copy=True), *args, **kwargs)

    return of_params, params


def _changes(given: Any, params: Any) -> Any:
    """The parameters, with None for those that did not change: results cost memory traffic."""
    known = dict(jax.tree.leaves_with_path(given))
    return jax.tree.map_with_path(lambda path, x: None if known.get(path) is x else x, params)


def _filled(given: Any, changed: Any) -> Any:
    """The inverse of `_changes`."""
    known = dict(jax.tree.leaves_with_path(given))
    return jax.tree.map_with_path(
        lambda path, x: known[path] if x is None else x, changed, is_leaf=lambda x: x is None
    )


def _is_model(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)


def _is_stateful(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


class _Call:
    """The arguments of a call, with the models among them numbered.

    `wanted` names the arguments to differentiate. Each of them is a tree of models; `params` holds
    the same tree with an `nnx.State` in place of each model.
    """

    def __init__(self, args: Any, kwargs: Any, wanted: Sequence[nnx.DiffState]):
        self._leaves, self._treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_model)
        self._wanted = wanted
        self.models = {i: x for i, x in enumerate(self._leaves) if _is_model(x)}
        for x in wanted:
            _check_models(x.argnum, args)
        numbers, _ = jax.tree.unflatten(self._treedef, range(len(self._leaves)))
        self._numbers = [numbers[x.argnum] for x in wanted]
        self._filters = [
            _of_models(jax.tree.leaves(tree), x.filter)
            for x, tree in zip(wanted, self._numbers, strict=True)
        ]

    def split(self, context: nnx.SplitContext, models: dict[int, Any]) -> tuple[Any, Any, Any]:
        """The graph of some models, the parameters to differentiate, and all other variables."""
        found: Any = context.split(models, *self._filters, ...)
        graph, *states, rest = found
        params = []
        for x, tree, state in zip(self._wanted, self._numbers, states, strict=True):
            if not state:
                raise ValueError(
                    f"argnums={x.argnum}: the argument has no variable that matches {x.filter}, or "
                    "argnums lists it twice; list it once, or use another filter in nnx.DiffState."
                )
            params.append(jax.tree.map(lambda i, state=state: state.get(i, nnx.State({})), tree))
        return graph, tuple(params), rest

    def merge(
        self, context: nnx.MergeContext, graph: Any, params: Sequence[Any], rest: Any
    ) -> dict[int, Any]:
        """The inverse of `split`."""
        states = []
        for tree, given in zip(self._numbers, params, strict=True):
            found = jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, nnx.State))
            pairs = zip(jax.tree.leaves(tree), found, strict=True)
            states.append(nnx.State({i: state for i, state in pairs if state}))
        return context.merge(graph, *states, rest)

    def arguments(self, models: dict[int, Any]) -> Any:
        """The arguments, with the given models in place of the original ones."""
        leaves = [models.get(i, x) for i, x in enumerate(self._leaves)]
        return jax.tree.unflatten(self._treedef, leaves)


def _check_models(argnum: int, args: tuple[Any, ...]) -> None:
    found = args[argnum] if -len(args) <= argnum < len(args) else None
    leaves = jax.tree.leaves(found, is_leaf=_is_model)
    if not leaves or not all(_is_model(x) for x in leaves):
        raise ValueError(
            f"argnums={argnum} refers to neither an NNX model nor a tree of models; pass the model "
            "by position, or use cdb_jax.value_and_grad for a tree of arrays."
        )


def _of_models(numbers: Sequence[int], variables: Any) -> Callable[[Any, Any], bool]:
    """A filter for some variables of the models with the given numbers."""
    is_wanted = nnx.filterlib.to_predicate(variables)
    return lambda path, x: path[0] in numbers and is_wanted(path[1:], x)


# Layers.

Rngs = nnx.Rngs | nnx.RngStream


def _check_rngs(rngs: Any) -> None:
    if not isinstance(rngs, (nnx.Rngs, nnx.RngStream)):
        raise TypeError(f"rngs must be nnx.Rngs, got {rngs!r}; use nnx.Rngs(0).")


class _RandomLayer(nnx.Module):
    """A layer that acts only in training, with a rate, a mode and a source of keys.

    `model.train()` and `model.eval()` set the mode, as for `nnx.Dropout`.
    """

    def __init__(
        self, rate: float, deterministic: bool, rng_collection: str, rngs: Rngs | None
    ) -> None:
        self.rate = check_call_rate(rate)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        if rngs is not None:
            _check_rngs(rngs)
        if is_exactly(self.rate, 0.0):
            rngs = None  # A rate of 0 must not change what other layers draw.
        elif isinstance(rngs, nnx.Rngs):
            rngs = rngs[rng_collection]
        self.rngs = nnx.data(None) if rngs is None else rngs.fork()

    def _is_evaluating(self, deterministic: bool | None) -> bool:
        return self.deterministic if deterministic is None else deterministic

    def _key(self, rngs: Rngs | jax.Array | None) -> jax.Array | None:
        if is_exactly(self.rate, 0.0):
            return None
        source = self.rngs if rngs is None else rngs
        if source is None:
            raise ValueError(
                f"rngs is missing: {type(self).__name__} draws random numbers in training. Pass "
                "rngs=nnx.Rngs(0) when you create or call the layer, or call model.eval()."
            )
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        if isinstance(source, jax.Array):
            return source
        _check_rngs(source)
        return source()

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode; `nnx.view` calls this.

        Args:
          deterministic: whether the layer is in evaluation mode.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class Backdrop(_RandomLayer):
    """`cdb_jax.backdrop` as a layer: the identity, but it masks the gradient in training.

    Args:
      rate: probability that an entry of the mask is dropped.
      axes: the axis or axes along which the mask varies.
      sample_axes: axes along which masks are independent.
      deterministic: whether the layer is in evaluation mode; `train()` and `eval()` change it.
      rng_collection: name of the stream of keys in `rngs`.
      rngs: the source of keys; you can pass it in the call instead.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = cdb_jax.nnx.Backdrop(0.5, axes=1, rngs=nnx.Rngs(0))
      >>> nnx.grad(lambda layer, x: jnp.sum(layer(x)), argnums=1)(layer, jnp.ones((1, 4)))
      Array([[0., 2., 0., 2.]], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        axes: int | Sequence[int],
        *,
        sample_axes: int | Sequence[int] = (),
        deterministic: bool = False,
        rng_collection: str = "backdrop",
        rngs: Rngs | None = None,
    ) -> None:
        super().__init__(rate, deterministic, rng_collection, rngs)
        self.axes = check_axes("axes", axes)
        self.sample_axes = check_axes("sample_axes", sample_axes, allow_empty=True)

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | jax.Array | None = None,
        mask: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        """Returns `x`. For diagnosis, `mask` replaces the random mask, even in evaluation mode."""
        if mask is None and self._is_evaluating(deterministic):
            return x
        key = self._key(rngs) if mask is None else None
        settings = dict(axes=self.axes, sample_axes=self.sample_axes)
        return backdrop(x, self.rate, key=key, mask=mask, **settings)


class DropPath(_RandomLayer):
    """`cdb_jax.drop_path` as a layer: drops a residual branch in training.

    Args:
      rate: probability that the branch is dropped.
      sample_axis: the axis of the samples, or None to drop the whole batch at once.
      scale_by_keep: whether to divide by `1 - rate` in training. If not, the layer multiplies by
        `1 - rate` in evaluation, as the original paper does (timm does not).
      deterministic: whether the layer is in evaluation mode; `train()` and `eval()` change it.
      rng_collection: name of the stream of keys in `rngs`.
      rngs: the source of keys; you can pass it in the call instead.

    Call it on the output of a branch, or use its methods to compute less: `branch`, which computes
    nothing if the branch is dropped for the whole batch, and `subset`, which computes the branch
    for the kept samples only.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> drop = cdb_jax.nnx.DropPath(0.5, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((4, 1))
      >>> x + drop(x)
      Array([[1.],
             [3.],
             [1.],
             [3.]], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        *,
        sample_axis: int | None = 0,
        scale_by_keep: bool = True,
        deterministic: bool = False,
        rng_collection: str = "drop_path",
        rngs: Rngs | None = None,
    ) -> None:
        super().__init__(rate, deterministic, rng_collection, rngs)
        self.sample_axis = sample_axis
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """Returns `x`, the output of a branch, or zeros if it is dropped."""
        if self._is_evaluating(deterministic):
            return in_evaluation(x, self.rate, self.scale_by_keep)
        key, axis, scaling = self._key(rngs), self.sample_axis, self.scale_by_keep
        return drop_path(x, self.rate, key=key, sample_axis=axis, scale_by_keep=scaling)

    def branch(
        self,
        branch: Callable[..., jax.Array],
        *args: Any,
        deterministic: bool | None = None,
        rngs: Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """Like `self(branch(*args))`, but does not compute the branch if it is dropped.

        A dropped branch does not change the state of its models, such as batch statistics and RNG
        counts.

        Args:
          branch: a function that returns one array. Pass the models that it calls in `args`.
          *args: models and arrays.
          deterministic: as in a call.
          rngs: as in a call.

        Raises:
          ValueError: if the layer has a `sample_axis`, because some samples may need the branch.
        """
        check_branch(branch, "drop.branch(branch, x)")
        if self.sample_axis is not None:
            raise ValueError(
                f"sample_axis={self.sample_axis}: branch() computes the branch for all samples or "
                "for none. Use sample_axis=None, or call the layer on the output of the branch."
            )
        if self._is_evaluating(deterministic):
            return in_evaluation(branch(*args), self.rate, self.scale_by_keep)
        settings = self.rate, self._key(rngs), self.scale_by_keep
        return run_branch(branch, args, *settings, cond=nnx.cond, eval_shape=nnx.eval_shape)

    def subset(
        self,
        branch: Callable[..., jax.Array],
        *args: Any,
        num_shards: int = 1,
        deterministic: bool | None = None,
        rngs: Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """`cdb_jax.drop_path_subset`: computes the branch for a fixed number of random samples.

        Batch normalisation in the branch sees these samples only.

        Args:
          branch: a function that returns one array. It may call models.
          *args: models and arrays of samples; the branch gets only the kept samples.
          num_shards: the number of devices that share the batch.
          deterministic: as in a call.
          rngs: as in a call.

        Raises:
          ValueError: if `sample_axis` is None.
        """
        check_branch(branch, "drop.subset(branch, x)")
        if self.sample_axis is None:
            raise ValueError(
                "sample_axis=None: subset() needs the axis of the samples; use sample_axis=0."
            )
        if self._is_evaluating(deterministic):
            return in_evaluation(branch(*args), self.rate, self.scale_by_keep)
        if is_exactly(self.rate, 1.0):
            return jax.tree.map(jnp.zeros_like, nnx.eval_shape(branch, *args))
        leaves, treedef = jax.tree.flatten(args, is_leaf=_is_stateful)

        def of_arrays(arrays: dict[int, jax.Array]) -> jax.Array:
            filled = [arrays.get(i, x) for i, x in enumerate(leaves)]
            return branch(*jax.tree.unflatten(treedef, filled))

        return drop_path_subset(
            of_arrays,
            {i: x for i, x in enumerate(leaves) if not _is_stateful(x)},
            rate=self.rate,  # type: ignore[arg-type]
            key=self._key(rngs),
            sample_axis=self.sample_axis,
            num_shards=num_shards,
            scale_by_keep=self.scale_by_keep,
        )


class DropBackward(_RandomLayer):
    """`cdb_jax.drop_backward` as a layer: drops the backward pass of a branch in training.

    Args:
      rate: probability that the backward pass is dropped.
      scale_by_keep: whether to divide the gradient of a kept branch by `1 - rate`.
      deterministic: whether the layer is in evaluation mode; `train()` and `eval()` change it.
      rng_collection: name of the stream of keys in `rngs`.
      rngs: the source of keys; you can pass it in the call instead.

    Examples:
      >>> import cdb_jax.nnx, jax.numpy as jnp
      >>> from flax import nnx
      >>> drop = cdb_jax.nnx.DropBackward(0.5, rngs=nnx.Rngs(0))
      >>> branch = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> def loss(branch, drop, x):
      ...     return jnp.sum(x + drop(branch, x))
      >>> [nnx.grad(loss)(branch, drop, jnp.ones((1, 2)))["bias"][...] for _ in range(4)][2:]
      [Array([0., 0.], dtype=float32), Array([1., 1.], dtype=float32)]
    """

    def __init__(
        self,
        rate: float,
        *,
        scale_by_keep: bool = False,
        deterministic: bool = False,
        rng_collection: str = "drop_backward",
        rngs: Rngs | None = None,
    ) -> None:
        super().__init__(rate, deterministic, rng_collection, rngs)
        self.scale_by_keep = check_bool("scale_by_keep", scale_by_keep)

    def __call__(
        self,
        branch: Callable[..., Any],
        *args: Any,
        kept: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | jax.Array | None = None,
    ) -> Any:
        """Returns `branch(*args)`.

        Variables of models, such as batch statistics and RNG counts, are updated as if the layer
        were not there; other attributes do not change. To pass keyword arguments to the branch,
        wrap it in a function.

        Args:
          branch: a model, a method of a model, or a function of models and arrays. Pass the models
            that a function calls in `args`.
          *args: models and arrays.
          kept: a bool scalar that decides whether to keep the backward pass, instead of a draw;
            usually an entry of the result of `kept_branches`. It is ignored in evaluation mode.
          deterministic: overrides the mode of the layer for this call.
          rngs: the source of keys for this call.
        """
        check_branch(branch, "drop(branch, x)")
        if self._is_evaluating(deterministic):
            return branch(*args)
        key = self._key(rngs) if kept is None else None
        method: Any = branch
        if inspect.ismethod(method):
            branch, args = method.__func__, (method.__self__, *args)
        leaves, treedef = jax.tree.flatten((branch, args), is_leaf=_is_stateful)
        models = {i: x for i, x in enumerate(leaves) if _is_stateful(x)}
        others = {i: x for i, x in enumerate(leaves) if i not in models}
        graph, state = nnx.split(models)

        def pure(state: Any, others: dict[int, Any]) -> tuple[Any, Any]:
            models = nnx.merge(graph, state, copy=True)
            filled = others | models
            branch, args = jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])
            results = branch(*args)
            return results, _changes(state, nnx.state(models))

        settings: Any = dict(rate=self.rate, kept=kept, scale_by_keep=self.scale_by_keep)
        try:
            results, changed = drop_backward(pure, state, others, key=key, **settings)
        except errors.TraceContextError as error:
            raise ValueError(
                "the branch changes a model that it closes over; pass the model or a method of it, "
                "as in drop(self.mlp, x), or pass the model in the arguments of the branch."
            ) from error
        filled = dict(nnx.to_flat_state(_filled(state, changed)))
        flat = [(p, filled[p]) for p, x in nnx.to_flat_state(changed) if jax.tree.leaves(x)]
        nnx.update(models, nnx.from_flat_state(flat))
        return results
