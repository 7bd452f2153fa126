"""The files of `cluster/` and the Dockerfile start what they say, with options that exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import ROOT

from moco.command import cli
from moco.command.train import EXTRAS
from moco.config import TrainConfig

OWN = ["--config", str(ROOT / "configs/imagenet_v2.yaml"), "--data.root", "IMAGENET"]


def parsed(words: list[str]):
    """Return settings and extras of what follows train.py."""
    assert words[0] == "train.py"
    parser = cli.build_parser("", TrainConfig, EXTRAS)
    return cli.parse(parser, TrainConfig, words[1:])


def started(script: str, program: str, folder: Path, **env: str) -> list[str]:
    """Run a script with a program that only tells its words; return these."""
    stand_in = folder / program
    stand_in.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | env
    return subprocess.run(
        ["bash", str(ROOT / "cluster" / script), *OWN],
        env=env, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip


def test_the_batch_script_starts_a_run_that_finds_itself_again(tmp_path):
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "moco", "SLURM_JOB_ID": "7"}
    words = started("slurm.sbatch", "srun", tmp_path, **env)
    assert words[0] == "python"
    config, extra = parsed(words[1:])
    assert (extra["resume"], config.run.dir, config.data.root) == (
        "auto",
        "runs/moco-7",
        "IMAGENET",
    )
    options = re.findall(r"^#SBATCH --([a-z-]+)", (ROOT / "cluster/slurm.sbatch").read_text(), re.M)
    assert {"requeue", "signal", "ntasks-per-node", "open-mode"} <= {*options}


def test_the_script_for_torchrun_restarts_with_the_machines_that_are_left(tmp_path):
    words = started("torchrun.sh", "torchrun", tmp_path, HEAD="one", RUN="runs/mine")
    place = words.index("train.py")
    config, extra = parsed(words[place:])
    assert (extra["resume"], config.run.dir) == ("auto", "runs/mine")
    options = dict(zip(words[:place:2], words[1:place:2], strict=True))
    assert options["--rdzv-endpoint"] == "one:29400" and options["--nnodes"] == "1:4"
    assert_known_to_torchrun(words)


def test_the_pods_of_kubernetes_meet_at_pod_0():
    service, job = yaml.safe_load_all((ROOT / "cluster/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["args"]
    config, extra = parsed(words[words.index("train.py") :])
    assert config.data.dataset == "shards" and extra["resume"] == "auto"
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--rdzv-endpoint={name}:29400" in words
    assert f"--nnodes={job['spec']['completions']}" in words
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert_known_to_torchrun([*container["command"][1:], *words])


def assert_known_to_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(words)
    assert found.training_script == "train.py" and found.max_restarts == 3


@pytest.mark.parametrize("line", re.findall(r"^COPY (.+)", (ROOT / "Dockerfile").read_text(), re.M))
def test_what_the_dockerfile_copies_is_there(line):
    assert all((ROOT / name).exists() for name in line.split()[:-1])
