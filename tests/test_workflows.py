"""What continuous integration tests is what the package says it supports."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_supported_version_is_tested():
    matrix = WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]
    classified = [x.split(" :: ")[-1] for x in PROJECT["classifiers"] if "Python :: 3." in x]
    assert matrix["python"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"
    oldest = next(x for x in PROJECT["dependencies"] if x.startswith("jax")).removeprefix("jax>=")
    assert f"{oldest}.*" in {row["jax"] for row in matrix["include"]}


def test_workflows_run_what_developers_run():
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {target.replace("$(VENV)", ".venv") for target in targets}
    called = set(WORKFLOWS["ci"]["jobs"]["check"]["strategy"]["matrix"]["target"])
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                called |= set(re.findall(r"^make ([\w./-]+)", step.get("run", ""), re.MULTILINE))
    assert called >= {"test", "lint", "docs", "wheel"} and called <= targets
