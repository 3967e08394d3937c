"""What the run folders of `train.py` hold, for tests that compare runs."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run_folder
import train


class SeenError(Exception):
    """Ends a run that was resumed only to look at it."""


def final_state(folder, data_dir, **changes):
    """The newest checkpoint: its step, and its leaves by path, keys as their words.

    Resumes the run on the devices at hand: only so is a checkpoint of others read. `changes` are
    flags that cannot be read off its settings.
    """
    found = []
    settings = json.loads((folder / "settings.json").read_text()) | changes
    settings = {name: x for name, x in settings.items() if name not in run_folder.COUNTS}
    settings["exempt"] = tuple(settings["exempt"])
    restore = run_folder.Run.restore

    def look(run, state, epochs):
        found.append(restore(run, state, epochs))
        run.__exit__(None, None, None)
        raise SeenError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SeenError):
        patch.setattr(run_folder.Run, "restore", look)
        config = train.Config(**settings, run_dir=folder, data_dir=data_dir, resume=True)
        train.train(config, brief=True)
    ((step, state),) = found
    assert step > 0
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(_words(x)) for path, x in leaves}


def digests(leaves):
    """By path one for dtype, shape and bytes of a leaf."""
    return {
        path: hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()
        for path, x in leaves.items()
    }


def _words(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(first, second, data_dir, **changes):
    """Bit for bit: parameters, optimizer state, keys, metrics; all but the speed."""
    found = (final_state(x, data_dir, **changes) for x in (first, second))
    (step, leaves), (other_step, other) = found
    assert step == other_step and leaves.keys() == other.keys() and leaves
    for path in leaves:
        assert leaves[path].tobytes() == other[path].tobytes(), path
    rows, other_rows = metrics(first), metrics(second)
    assert [row.keys() for row in rows] == [row.keys() for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row | {"images_per_second": 0} == other_row | {"images_per_second": 0}
