"""The long ones: `make soak`. Twenty kills, and twenty thousand steps."""

import logging
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stored_runs import assert_same_runs, metrics

import cdb_jax
import train

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("standard_promotion")]
KILLS, STEPS = 20, 20_000


def test_twenty_kills(tmp_path, data_dir, compilation_cache, monkeypatch):
    """A run that is killed again and again, while it saves included, ends as one left alone."""
    monkeypatch.setenv("XLA_FLAGS", "")

    def start(name):
        arguments = ["--model", "vit_mini/4", "--method", "cdb_frozen", "--epochs", "150"]
        arguments += ["--run-dir", tmp_path / name, "--data-dir", data_dir, "--resume"]
        with open(tmp_path / f"{name}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, Path(train.__file__), *arguments],
                stdout=log,
                stderr=log,
            )

    alone = start("alone")
    assert alone.wait(timeout=900) == 0, (tmp_path / "alone.log").read_text()
    rng, while_saving = random.Random(0), 0
    checkpoints = tmp_path / "killed" / "checkpoints"

    def newest():
        return max((int(x.name) for x in checkpoints.glob("*") if x.name.isdigit()), default=0)

    def unfinished():
        return list(checkpoints.glob("*tmp*"))

    for kill in range(KILLS):
        goal = newest() + 20 * rng.randint(1, 3)
        process = start("killed")
        # After a few epochs of this process, strike at any moment of the next, or while it saves.
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and newest() < goal:
            time.sleep(0.01)
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        if kill % 2:
            while process.poll() is None and not unfinished():
                pass
        else:
            time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        while_saving += bool(unfinished())
    assert while_saving > 0
    print(f"{KILLS} kills, {while_saving} while a checkpoint was written")
    last = start("killed")
    assert last.wait(timeout=900) == 0, (tmp_path / "killed.log").read_text()
    assert_same_runs(tmp_path / "alone", tmp_path / "killed", data_dir)
    assert metrics(tmp_path / "killed")[-1]["step"] == 150 * 20


def test_twenty_thousand_steps(caplog):
    """Flat memory, flat step time, one compilation, and the statistics of the selection."""
    policy = cdb_jax.Policy(0.3, key=0, layer_rate=0.7)
    tx = optax.chain(cdb_jax.channel_drop_back(policy), optax.adamw(1e-3))
    params = {
        f"dense{i}": {"kernel": jax.random.normal(key, (32, 32)) / 6}
        for i, key in enumerate(jax.random.split(jax.random.key(0), 3))
    }
    x = jax.random.normal(jax.random.key(1), (16, 32))

    def loss(params):
        y = x
        for layer in params.values():
            y = jnp.tanh(y @ layer["kernel"])
        return jnp.mean((y - x) ** 2)

    @jax.jit
    def step(params, state, total):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state, total + state[0].dropped_fraction

    state, total = tx.init(params), jnp.zeros(())
    seconds, memory = [], []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for block in range(20):
            start = time.perf_counter()
            for _ in range(STEPS // 20):
                params, state, total = step(params, state, total)
            jax.block_until_ready(total)
            seconds.append(time.perf_counter() - start)
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append(resident * resource.getpagesize() // 1024)
            if block == 0:
                caplog.clear()
    assert not [r for r in caplog.records if "Compiling" in r.message]
    assert memory[-1] - memory[4] < 20_000  # Kilobytes, over 15,000 steps.
    assert np.median(seconds[-5:]) < 1.5 * np.median(seconds[1:6])
    assert state[0].count == STEPS
    # A layer's share has variance E[share^2] - mean^2, with 32 channels and 3 layers a step.
    mean = 0.7 * 0.3
    square = 0.7 * (0.3 * 0.7 / 32 + 0.3**2)
    error = np.sqrt((square - mean**2) / (3 * STEPS))
    assert abs(float(total) / STEPS - mean) < 4 * error
