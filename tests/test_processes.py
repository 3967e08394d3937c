"""Several processes: they learn what one learns, and none goes on without the others."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from stored_runs import assert_same_runs, metrics

import errors
import launch
import processes
import train
from errors import first_line

pytestmark = pytest.mark.usefixtures("standard_promotion", "compilation_cache")
# Images that fill the devices of two processes, and of one with two.
SETTINGS = ("--model", "vit_mini/4", "--method", "cdb_frozen", "--batch-size", "160")


@pytest.fixture
def flags(tmp_path, data_dir, monkeypatch):
    """The arguments for a run folder of that name."""
    monkeypatch.setenv("XLA_FLAGS", "")

    def make(name, epochs, *more):
        folders = ("--run-dir", str(tmp_path / name), "--data-dir", str(data_dir))
        return (*SETTINGS, "--epochs", str(epochs), *folders, *more)

    return make


def wait_for_epoch(folder, epoch, processes):
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < epoch:
        assert time.monotonic() < deadline and all(x.poll() is None for x in processes)
        time.sleep(0.05)


def run_alone(flags, devices):
    count = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, train.__file__, *flags]
    result = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": count}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(flags, tmp_path, data_dir):
    assert launch.outcome(launch.start(2, flags("two", 1))) == 0
    run_alone(flags("one", 1), devices=2)
    assert all(row["dropped_fraction"] > 0.2 for row in metrics(tmp_path / "one"))
    assert_same_runs(tmp_path / "one", tmp_path / "two", data_dir)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_though_one_dies(flags, tmp_path, data_dir, capfd):
    """Bit for bit, with one checkpoint and one voice."""
    processes = launch.start(2, flags("two", 3))
    wait_for_epoch(tmp_path / "two", 1, processes)
    processes[1].kill()
    start = time.monotonic()
    message = launch.outcome(processes)
    assert time.monotonic() - start < 120
    assert "process 1 of 2 failed first (SIGKILL)" in message
    assert processes[0].returncode not in (0, None)
    lost = len(metrics(tmp_path / "two"))
    assert 1 <= lost < 3

    capfd.readouterr()
    assert launch.outcome(launch.start(2, flags("two", 3, "--resume"))) == 0
    shown = capfd.readouterr().out
    assert shown.count("epoch 3/3") == 1 and shown.count("train accuracy") == 1
    run_alone(flags("one", 3), devices=2)
    assert_same_runs(tmp_path / "one", tmp_path / "two", data_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_stopped_launch_stops_all(flags, tmp_path, number):
    log = open(tmp_path / "log", "w+")
    launcher = subprocess.Popen(
        [sys.executable, launch.__file__, "--processes", "2", *flags("run", 1000)],
        stdout=log,
        stderr=log,
    )
    with log:
        wait_for_epoch(tmp_path / "run", 1, [launcher])
        launcher.send_signal(number)
        assert launcher.wait(timeout=120) == 128 + number
        log.seek(0)
        shown = log.read()
    assert shown.count("go on with --resume") == 1 and "Traceback" not in shown


A_SLOW_NETWORK = """
import math, os, pathlib, time
import training
from flax import nnx

folder, distribute = pathlib.Path(__file__).parent, training.distribute


def spend(seconds, event):
    with (folder / event).open("a") as file:
        file.write(".")
    time.sleep(seconds)


def slowly(*arguments):
    spend(float(os.environ["STEP_SECONDS"]), "batches")
    return distribute(*arguments)


training.distribute = slowly  # As long as a step of a large network, or of its evaluation.


def network(num_classes, image_shape, rngs):
    spend(float(os.environ["BUILD_SECONDS"]), "builds")
    head = nnx.Linear(math.prod(image_shape), num_classes, rngs=rngs)
    return nnx.Sequential(lambda images: images.reshape(len(images), -1), head)
"""
BATCHES = 8  # Of an epoch: 1,297 images in batches of 160.


@pytest.fixture
def start_slowly(flags, tmp_path, monkeypatch):
    """Starts processes that train a slow network in the folder "run", and waits until each of them
    has had an event so many times."""
    (tmp_path / "slow.py").write_text(A_SLOW_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(count, epochs, *more, step=0.0, build=0.0, until=None):
        monkeypatch.setenv("STEP_SECONDS", str(step))
        monkeypatch.setenv("BUILD_SECONDS", str(build))
        network = ("--model", "slow:network", "--method", "none")
        started = launch.start(count, flags("run", epochs, *network, *more))
        event, times = until or ("batches", 0)
        file, deadline = tmp_path / event, time.monotonic() + 240
        while times and (not file.exists() or len(file.read_text()) < times * count):
            assert time.monotonic() < deadline and all(x.poll() is None for x in started)
            time.sleep(0.05)
        return started

    return start


def checkpoints(folder):
    """The steps of complete ones."""
    return sorted(int(x.name) for x in (folder / "checkpoints").iterdir() if x.name.isdecimal())


def stopped(processes, number=signal.SIGTERM):
    """How processes end that a scheduler stops, which kills half a minute later."""
    for process in processes:
        process.send_signal(number)
    return [x.wait(timeout=24.0) for x in processes]


@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
@pytest.mark.slow
def test_a_stop_between_long_steps_is_saved_in_time(start_slowly, tmp_path, count, number):
    started = start_slowly(count, 100, step=4.0, until=("batches", 3))
    assert stopped(started, number) == [128 + number] * count
    assert checkpoints(tmp_path / "run")[0] >= 2


@pytest.mark.slow
def test_a_stop_before_the_first_step(start_slowly, tmp_path):
    started = start_slowly(2, 100, build=4.0, until=("builds", 1))
    assert stopped(started) == [128 + signal.SIGTERM] * 2
    assert checkpoints(tmp_path / "run")[0] <= 2


@pytest.mark.slow
def test_a_stop_in_the_evaluation(start_slowly, tmp_path):
    """The epoch that has been trained is saved, and evaluated later."""
    started = start_slowly(2, 1, step=2.0, until=("batches", BATCHES + 1))
    assert stopped(started) == [128 + signal.SIGTERM] * 2
    assert checkpoints(tmp_path / "run") == [BATCHES]
    assert not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run")
    assert launch.outcome(start_slowly(2, 1, "--resume")) == 0
    (row,) = metrics(tmp_path / "run")
    assert row["step"] == BATCHES and row["images_per_second"] is None


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch(start_slowly, tmp_path):
    """From a checkpoint of `--save-every`, to what they learn without a break."""
    started = start_slowly(2, 2, "--save-every", "3", step=1.0, until=("batches", 5))
    for process in started:
        process.kill()
        process.wait()
    assert checkpoints(tmp_path / "run") == [3]
    assert launch.outcome(start_slowly(2, 2, "--resume")) == 0
    resumed = (tmp_path / "run").rename(tmp_path / "resumed")
    assert launch.outcome(start_slowly(2, 2)) == 0
    rows, unbroken = (
        [row | {"images_per_second": 0} for row in metrics(folder)]
        for folder in (resumed, tmp_path / "run")
    )
    assert len(rows) == 2 and rows == unbroken


@pytest.mark.slow
def test_a_run_folder_of_two_processes_that_is_removed(start_slowly, tmp_path, capfd):
    started = start_slowly(2, 100, step=0.5, until=("batches", 2))
    shutil.rmtree(tmp_path / "run")
    start = time.monotonic()
    launch.wait(started)
    assert time.monotonic() - start < 60 and all(x.returncode for x in started)
    shown = capfd.readouterr().err
    assert "No such file" in shown and "Traceback" not in shown


@pytest.fixture
def joined(monkeypatch):
    """What JAX is asked to join."""
    calls = []
    others = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_PORT")
    for name in (*processes.LAUNCHERS, *others):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    return calls


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "16"}, True),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476"}, False),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"}, True),
    ],
    ids=str,
)
def test_processes_of_a_launcher_join(monkeypatch, joined, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join("never")
    assert joined == []
    processes.join("auto")
    assert len(joined) == joins
    processes.join("always")
    assert len(joined) == joins + 1


@pytest.mark.bad_input
@pytest.mark.parametrize("when", ["auto", "never"])
def test_a_pod_whose_processes_have_not_joined(monkeypatch, joined, when):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    message = "one of 4 processes, which have not joined each other; pass --distributed always"
    with pytest.raises(errors.UserError, match=message):
        processes.join(when)
    assert joined == []


@pytest.mark.bad_input
@pytest.mark.slow
def test_processes_with_different_run_folders(flags, tmp_path):
    """As on two hosts without a shared file system."""
    address = f"127.0.0.1:{free_port()}"
    together = ("--coordinator", address, "--process-count", "2", "--run-dir", "run")
    started = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        command = [sys.executable, train.__file__, *flags("run", 1), *together]
        started.append(
            subprocess.Popen(
                [*command, "--process-id", str(i)],
                cwd=tmp_path / str(i),
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, shown = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in shown
        assert "error: --run-dir run is not the same folder for process 0 and process 1" in shown


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("reason", "kind"),
    [("DEADLINE_EXCEEDED: no process 1", errors.PassingError), ("no address", errors.UserError)],
)
def test_others_that_do_not_come_in_time(monkeypatch, joined, reason, kind):
    """Another attempt may find them, but not an address that is missing."""

    def initialize(*args, **kwargs):
        raise RuntimeError(reason)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(errors.UserError, match=f"did not start: {reason}") as caught:
        processes.join("always")
    assert caught.type is kind


def test_steps_of_a_job_have_ports_of_their_own(monkeypatch, joined):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    ports = set()
    for step in range(40):
        monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        processes.join("always")
        ports.add(int(os.environ["JAX_COORDINATOR_PORT"]))
    assert len(ports) == 40 and min(ports) > 61439 and max(ports) < 65536


def run_python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", f"import jax, sys, processes\n{code}"],
        env=os.environ
        | {"PYTHONPATH": os.path.dirname(processes.__file__), "JAX_PLATFORMS": "cpu"}
        | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


JOINING = """
try:
    processes.join("auto", sys.argv[1], 1, 0)
except Exception as error:
    processes.leave(error)
print(jax.process_count(), "joined", flush=True)
"""


def free_port(family=socket.AF_INET, host="127.0.0.1"):
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def join_alone(coordinator, **variables):
    """What a process says that joins no other, at this address."""
    result = run_python(JOINING.replace("sys.argv[1]", repr(coordinator)), **variables)
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_addresses_of_process_0(host):
    try:
        port = free_port(socket.AF_INET6, "::1") if host == "[::1]" else free_port()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert join_alone(f"{host}:{port}") == "1 joined\n"


@pytest.mark.parametrize("name", ["http_proxy", "grpc_proxy"])
def test_no_proxy_is_asked_for_process_0(name):
    """gRPC would hang for minutes."""
    shown = join_alone(f"127.0.0.1:{free_port()}", **{name: "http://127.0.0.1:9"})
    assert shown == "1 joined\n"


@pytest.mark.bad_input
def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        shown = join_alone(address)
    assert f"error: --coordinator {address}: process 0 cannot use that port" in shown


@pytest.mark.bad_input
@pytest.mark.parametrize("platform", ["cuda", "tpu", "abacus"])
@pytest.mark.parametrize("coordinator", [None, "127.0.0.1"], ids=["alone", "of several"])
def test_a_platform_that_is_not_there(platform, coordinator):
    code = JOINING.replace("sys.argv[1], 1, 0", "")
    if coordinator:
        code = JOINING.replace("sys.argv[1]", repr(f"{coordinator}:{free_port()}"))
    result = run_python(code, JAX_PLATFORMS=platform)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (shown,) = result.stderr.splitlines()
    assert shown.startswith(f"error: JAX_PLATFORMS={platform} cannot be used: ")
    assert "leave JAX_PLATFORMS out" in shown


@pytest.mark.parametrize(("gpus", "warns"), [(8, False), (9, True)])
def test_idle_gpus_are_told(monkeypatch, gpus, warns):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(processes, "num_gpus", lambda: gpus)
    shown = processes.device_summary()
    assert shown.startswith("1 process; 8 x cpu")
    assert ("all in use" in shown) != warns
    assert (f"only 8 of the {gpus} GPUs of a node are used" in shown) == warns


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        ({"SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 2),
    ],
    ids=str,
)
def test_gpus_that_a_run_may_use(monkeypatch, variables, gpus):
    """On a shared node, others have the rest."""
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["gpu"] * 3)
    assert processes.num_gpus() == gpus


@pytest.mark.parametrize(
    ("nodes", "told"),
    [([7, 7, 7, 7], "on one node"), ([7, 7, 9, 9], ", 2 on each of 2 nodes")]
    + [([7, 7, 7, 9], ", 1 to 3 on each of 2 nodes")],
    ids=str,
)
def test_the_devices_of_each_node_are_told(monkeypatch, joined, nodes, told):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    found = np.array([[node, 1, 0] for node in nodes])
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda mine: found)
    assert re.fullmatch(f"4 processes; 4 x cpu ?{told}", processes.device_summary())


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error",
        "INTERNAL: Async NCCL error: remote process exited or there was a network error",
        "Gloo all-reduce failed: Connection reset by peer",
    ],
)
def test_an_error_of_talking_to_another_process(monkeypatch, text):
    assert not processes.is_lost(RuntimeError(text))  # There is no other.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.is_lost(RuntimeError(text))
    assert not processes.is_lost(RuntimeError("INTERNAL: a product failed"))


def test_under_mpi_in_a_slurm_job_the_port_is_that_of_mpi(monkeypatch, joined):
    """Which all ranks can tell; only some of them know a step of the job."""
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    variables = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.join("auto")
    assert "JAX_COORDINATOR_PORT" not in os.environ


def test_the_cause_of_an_error_is_told():
    prefixes = "INTERNAL: Error dispatching computation: " * 20
    error = RuntimeError(prefixes + "Gloo all-reduce failed: connection closed by peer\n...")
    assert first_line(error) == "Gloo all-reduce failed: connection closed by peer"
    assert first_line(KeyError("a" * 400)) == "'" + 295 * "a" + " ..."
    assert first_line(ValueError("a: b: c")) == "a: b: c" and first_line(OSError()) == "OSError"


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
class TestOpenMPI:
    """Real launches: no flag says that there are two processes."""

    def start(self, flags):
        command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
        command += ["--mca", "odls_base_sigkill_timeout", "60"]  # Else one second.
        return subprocess.Popen(
            [*command, sys.executable, train.__file__, *flags],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def test_two_processes_are_one_run(self, flags, tmp_path):
        launched = self.start(flags("two", 2))
        shown, _ = launched.communicate(timeout=300)
        assert launched.returncode == 0, shown
        assert "2 processes, started by Open MPI; 2 x cpu" in shown
        assert shown.count("epoch 2/2") == 1 and "\x1b" not in shown and "\r" not in shown
        assert len(metrics(tmp_path / "two")) == 2
        assert len(list((tmp_path / "two/checkpoints").iterdir())) == 2

    @pytest.mark.slow
    def test_a_stop_is_heard_by_both(self, flags, tmp_path):
        launched = self.start(flags("two", 1000))
        wait_for_epoch(tmp_path / "two", 1, [launched])
        launched.send_signal(signal.SIGTERM)
        shown, _ = launched.communicate(timeout=120)
        assert launched.returncode != 0
        assert shown.count("go on with --resume") == 1, shown
        assert "Traceback" not in shown

    def test_a_killed_process_is_named(self, flags, tmp_path):
        launched = self.start(flags("two", 1000))
        wait_for_epoch(tmp_path / "two", 1, [launched])
        os.kill(child_of_rank(launched.pid, 1), signal.SIGKILL)
        shown, _ = launched.communicate(timeout=120)
        assert launched.returncode != 0
        assert re.search(r"process rank 1 with PID \d+ .* exited on signal 9", shown), shown


def child_of_rank(parent, rank):
    """The process of Open MPI that has this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"OMPI_COMM_WORLD_RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError(f"no child of rank {rank}")


PLAYS = {  # What three processes do, and what is said of it.
    "a death": (["exit(0)", "exit(75)", "kill(9)"], "process 2 of 3 failed first (SIGKILL)"),
    "an error": (["exit(75)", "exit(3)", "abort()"], "process 1 of 3 failed first (exit code 3)"),
    "a hang": (["exit(75)", "sleep(600)", "abort()"], "process 1 of 3 failed first (killed after"),
    "no other cause": (["exit(75)", "abort()", "exit(0)"], "process"),
    "one reason": (["exit(2)"] * 3, 2),
    "success": (["exit(0)"] * 3, 0),
}


@pytest.mark.parametrize("name", PLAYS)
def test_the_launcher_says_which_one_failed(monkeypatch, name):
    acts, message = PLAYS[name]
    monkeypatch.setattr(launch, "GRACE", 1.0)
    head = "import os, sys; from time import sleep; from os import abort; exit = os._exit; "
    head += "kill = lambda number: os.kill(os.getpid(), number); "
    started = [subprocess.Popen([sys.executable, "-c", head + act]) for act in acts]
    found = launch.outcome(started)
    assert found == message or (isinstance(message, str) and message in found)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--processes", "0"], 1, "error: --processes 0 must be positive"),
        (["--processes", "2", "--model", "vgg"], 1, "error: unknown model 'vgg'"),
    ],
    ids=["processes", "model"],
)
def test_mistakes(arguments, code, message):
    command = [sys.executable, launch.__file__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == code and message in result.stderr
    assert "Traceback" not in result.stderr and "failed first" not in result.stderr


def test_the_job_for_kubernetes_knows_the_exit_codes_of_the_script():
    file = Path(launch.__file__).with_name("cluster") / "train.yaml"
    service, job = yaml.safe_load_all(file.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    codes = rules["FailJob"]["onExitCodes"]
    assert codes["containerName"] == container["name"]
    # A mistake has 1 or 2; a process that lost another one must be able to try again.
    assert codes["operator"] == "In" and codes["values"] == [1, 2]
    assert processes.LOST not in codes["values"]
    name = job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    flags = container["command"][2:]
    assert f"--process-count={spec['completions']}" in flags
    assert spec["completions"] == spec["parallelism"] and "--resume" in flags
    assert any(x.startswith(f"--coordinator={name}-0.{pod['subdomain']}:") for x in flags)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_four_processes_and_any_of_them_dies(flags, tmp_path, victim, number):
    """One that hangs is as good as dead."""
    processes = launch.start(4, flags("four", 1000))
    wait_for_epoch(tmp_path / "four", 1, processes)
    processes[victim].send_signal(number)
    start = time.monotonic()
    others = [x for i, x in enumerate(processes) if i != victim]
    codes = [x.wait(timeout=120) for x in others]
    print(f"{number.name} of process {victim}: others ended in {time.monotonic() - start:.1f} s")
    assert 0 not in codes
    processes[victim].kill()
    assert f"process {victim} of 4 failed first (SIGKILL)" in launch.outcome(processes)


@pytest.mark.soak
def test_four_processes_learn_what_one_learns(flags, tmp_path, data_dir):
    """To the order of a sum over devices."""
    assert launch.outcome(launch.start(4, flags("four", 3))) == 0
    run_alone(flags("one", 3), devices=4)
    four, one = metrics(tmp_path / "four"), metrics(tmp_path / "one")
    assert [x["dropped_fraction"] for x in four] == [x["dropped_fraction"] for x in one]
    for name in ("train_loss", "test_loss"):
        assert [row[name] for row in four] == pytest.approx([row[name] for row in one], rel=1e-4)


@pytest.mark.soak
def test_a_run_of_four_processes_goes_on_in_two(flags, tmp_path):
    processes = launch.start(4, flags("run", 6))
    wait_for_epoch(tmp_path / "run", 2, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert launch.outcome(processes) == 128 + signal.SIGTERM
    assert launch.outcome(launch.start(2, flags("run", 6, "--resume"))) == 0
    run_alone(flags("one", 6), devices=4)
    moved, one = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    assert [x["dropped_fraction"] for x in moved] == pytest.approx(
        [x["dropped_fraction"] for x in one]
    )
    for name in ("train_loss", "test_loss"):
        assert [row[name] for row in moved] == pytest.approx([row[name] for row in one], rel=1e-3)
