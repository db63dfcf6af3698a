"""The files of docs/launch: valid, and with flags and keys that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from solov2_jax.config import base_config, flatten
from solov2_jax.tools.cli import app, train

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "docs" / "launch").iterdir())


def arguments(text):
    """Returns the flags behind "train.py", up to the end of the command."""
    (command,) = re.findall(r"train\.py((?:[^\n]|\n)*?)(?:\n\s*envFrom|\Z)", text)
    return re.findall(r"--([\w.]+)", command)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_flag_and_key_exists(file):
    flags = {flag.name for flag in (*train.FLAGS, *app.PLATFORM)}
    keys = flatten(base_config())
    names = arguments(file.read_text())
    assert {"config", "workdir"} <= set(names)
    for name in names:
        key = name.removeprefix("config.")
        assert (key in keys) if "." in name else (name in flags), name
    assert set(names) & {"distributed", "coordinator"}
    assert f"launch/{file.name}" in (ROOT / "docs" / "distributed.md").read_text()


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix == ".sh"], ids=lambda f: f.name)
def test_scripts_are_bash(file):
    subprocess.run([shutil.which("bash") or "bash", "-n", str(file)], check=True)
    assert "set -euo pipefail" in file.read_text()


def test_the_kubernetes_job_finds_its_first_process():
    service, job = yaml.safe_load_all((ROOT / "docs/launch/kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["spec"]["clusterIP"] == "None", "a headless service"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    command = container["args"][0]
    assert f"--coordinator={name}-0.{service['metadata']['name']}:" in command
    assert f"--num_processes={spec['completions']} " in command
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert "\n" not in command, "one command"
