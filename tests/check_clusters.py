"""`train.py` under a real Slurm, of one node on this machine: `make cluster-check`.

Needs root and Debian's packages slurmd, slurmctld, slurm-client and munge.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "examples/cluster/train.sbatch"
SETTINGS = ["--model", "vit_mini/4", "--batch-size", "160"]
CONFIGURATION = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=60
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=40 OverSubscribe=FORCE:4
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def has_slurm():
    return all(map(shutil.which, ("slurmctld", "slurmd", "munged", "srun")))


pytestmark = pytest.mark.skipif(
    not has_slurm() or os.geteuid() != 0, reason="needs root, slurmd, slurmctld and munge"
)


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    """A cluster of this machine, over loopback."""
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder))
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    servers = [["runuser", "-u", "munge", "--", "munged", "-F"], ["slurmctld", "-D"]]
    servers.append(["slurmd", "-D", "-N", host])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "")
        patch.setenv("PYTHON", sys.executable)
        running = []
        for server in servers:
            with open(folder / f"{server[0]}.out", "w") as log:
                running.append(subprocess.Popen(server, env=environment, stdout=log, stderr=log))
            time.sleep(1.0)
        try:
            wait_until(lambda: "idle" in output("sinfo", "-h", "-o", "%T"), 60)
            yield
        finally:
            stop(running)


def stop(servers):
    for server in reversed(servers):
        server.terminate()
        server.wait(timeout=30)


def output(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def wait_until(happened, seconds=240):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def metrics(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def submit(folder, log, epochs, *more):
    """A job of the script that users start from, without GPUs."""
    options = [
        *more,
        f"--output={log}",
        "--ntasks-per-node=2",
        "--cpus-per-task=1",
        "--gpus-per-node=0",
    ]
    flags = [*SETTINGS, "--epochs", str(epochs), "--run-dir", str(folder)]
    shown = output("sbatch", *options, str(SBATCH), *flags)
    return re.search(r"\d+", shown)[0]


def state(job):
    return re.search(r"JobState=(\S+)", output("scontrol", "show", "job", job))[1]


def test_two_tasks_are_one_run(tmp_path):
    command = ["srun", "-n", "2", sys.executable, "examples/train.py", *SETTINGS, "--epochs", "2"]
    command += ["--run-dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 processes, started by Slurm; 2 x cpu" in result.stdout
    assert result.stdout.count("epoch 2/2") == 1 and len(metrics(tmp_path / "run")) == 2


def test_two_steps_of_a_job_run_side_by_side(tmp_path):
    run = "srun --overlap -n 2 $PYTHON examples/train.py --epochs 2 --model vit_mini/4 "
    run += f"--batch-size 160 --run-dir {tmp_path}/"
    script = f"{run}a & {run}b & wait -n && wait -n"
    result = subprocess.run(
        ["salloc", "-n", "2", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(metrics(tmp_path / "a")) == len(metrics(tmp_path / "b")) == 2


def test_a_job_that_is_stopped_is_requeued_and_goes_on(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(run, log, 40)
    wait_until(lambda: len(metrics(run)) >= 2)
    start = time.monotonic()
    output("scancel", "--signal=TERM", job)
    wait_until(lambda: "go on with --resume" in log.read_text(), 60)
    print(f"saved {time.monotonic() - start:.1f} s after the signal")
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False)
    wait_until(lambda: state(job) == "COMPLETED", 400)
    assert [row["epoch"] for row in metrics(run)] == list(range(1, 41))
    assert "Traceback" not in log.read_text(), log.read_text()


def goes_on(job, folder):
    """Whether a requeued job goes on with its run; at once, as Slurm would wait for two minutes."""
    complete = len(metrics(folder))
    wait_until(lambda: state(job) == "PENDING", 60)
    output("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_until(lambda: len(metrics(folder)) > complete)
    output("scancel", job)
    wait_until(lambda: state(job) == "CANCELLED", 120)
    epochs = [row["epoch"] for row in metrics(folder)]
    return epochs == list(range(1, len(epochs) + 1))


def test_a_job_that_more_urgent_ones_preempt_goes_on_after_them(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(run, log, 1000)
    wait_until(lambda: len(metrics(run)) >= 2)
    options = ["--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null"]
    urgent = output("sbatch", *options, "--wrap", "sleep 20")
    wait_until(lambda: "go on with --resume" in log.read_text(), 40)
    wait_until(lambda: state(urgent.strip()) == "COMPLETED", 120)
    assert goes_on(job, run) and "Traceback" not in log.read_text()


def test_a_job_whose_time_is_up_is_saved_and_goes_on(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(run, log, 10_000, "--time=3")  # Slurm may send the signal a minute early.
    wait_until(lambda: log.exists() and "go on with --resume" in log.read_text())
    assert goes_on(job, run)
    assert "Traceback" not in log.read_text() and "DUE TO TIME LIMIT" not in log.read_text()


def test_a_task_that_is_killed_is_started_again(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = submit(run, log, 40)
    wait_until(lambda: len(metrics(run)) >= 2)
    (victim, *_) = output("pgrep", "-f", f"^{sys.executable} examples/train.py.*{run}").split()
    output("kill", "-KILL", victim)
    wait_until(lambda: state(job) == "COMPLETED", 400)
    assert [row["epoch"] for row in metrics(run)] == list(range(1, 41))
    assert "attempt 1 of 3 ended with" in log.read_text()


def test_two_jobs_in_one_folder(tmp_path):
    """The second waits for the first to end, and goes on."""
    run, log = tmp_path / "run", tmp_path / "second"
    first = submit(run, tmp_path / "first", 1000)
    wait_until(lambda: len(metrics(run)) >= 1)
    second = submit(run, log, 1000)
    wait_until(lambda: log.exists() and "attempt 1 of 3 ended with 75" in log.read_text(), 120)
    assert "is in use by process" in log.read_text()
    output("scancel", first)
    wait_until(lambda: state(first) == "CANCELLED", 120)
    assert "Traceback" not in (tmp_path / "first").read_text()
    complete = len(metrics(run))
    wait_until(lambda: len(metrics(run)) > complete)
    output("scancel", second)
    wait_until(lambda: state(second) == "CANCELLED", 120)
    assert "Traceback" not in log.read_text()
