"""The launchers are correct shell, say what schedulers understand, and do what their first lines promise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes.client.models as core
import pytest
import yaml
from kubeflow.training import models as kubeflow

from launch import ROOT

SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def stub(folder: Path, name: str, body: str) -> None:
    """A command of that name which writes down how it was called, and then does what ``body`` says."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{folder}/calls"\n{body}\n')
    path.chmod(0o755)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    stub(folder, "scontrol", '[ "$1" = show ] && printf "node-3\\nnode-4\\n"\nexit 0')
    return folder


def slurm(stubs: Path, **more: str) -> dict[str, str]:
    """What Slurm sets for a batch script."""
    given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[3-4]"}
    given |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "PATH": f"{stubs}:{os.environ['PATH']}"}
    return os.environ | given | more


def calls(stubs: Path) -> list[str]:
    return (stubs / "calls").read_text().splitlines()


def batch(stubs: Path) -> subprocess.Popen[bytes]:
    words = ["bash", ROOT / "launch/slurm.sbatch", "run.name=big", "parallel.ep=16"]
    return subprocess.Popen(words, env=slurm(stubs), stderr=subprocess.DEVNULL)


def test_slurm_starts_one_launcher_per_node(stubs: Path) -> None:
    stub(stubs, "srun", "exit 0")
    assert batch(stubs).wait(20) == 0
    assert calls(stubs)[-1] == "srun bash launch/nodes.sh 2 node-3:21234 8 run.name=big parallel.ep=16"
    assert not any("requeue" in call for call in calls(stubs))


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_waits_for_the_checkpoint_and_queues_the_job_again(stubs: Path, number: int, requeued: bool) -> None:
    name = signal.Signals(number).name
    saves = f"sleep 0.5; echo saved >> {stubs}/calls; exit 1"
    stub(stubs, "srun", f"trap '{saves}' {name}\necho ready >> {stubs}/calls\nwhile true; do sleep 0.1; done")
    process = batch(stubs)
    deadline = time.monotonic() + 20
    while not (stubs / "calls").exists() or "ready" not in calls(stubs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 1
    after = calls(stubs)[calls(stubs).index("ready") + 1 :]
    assert after == ["saved", "scontrol requeue 41234"][: 1 + requeued]


def test_slurm_does_not_queue_a_job_that_failed(stubs: Path) -> None:
    stub(stubs, "srun", "exit 3")
    assert batch(stubs).wait(20) == 3
    assert not any("requeue" in call for call in calls(stubs))


def test_slurm_asks_for_the_signal_that_the_script_waits_for() -> None:
    text = (ROOT / "launch/slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"].startswith("B:USR1@"), "to the batch script, which has the trap"
    assert options["ntasks-per-node"] == "1" and "requeue" in options and options["open-mode"] == "append"


def test_nodes_tells_torchrun_where_to_meet(tmp_path: Path, stubs: Path) -> None:
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    for name in ("nodes.sh", "settings.sh"):
        (project / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    stub(stubs, "torchrun", 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$(dirname "$0")/calls"')
    words = ["bash", project / "launch/nodes.sh", "2", "host:29400", "4", "run.name=big"]
    subprocess.run(words, env=slurm(stubs, STOP_S="99", RUN_ID="r7"), check=True)
    call, stop_s = calls(stubs)
    assert stop_s == "99"
    assert call == (
        "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=host:29400 --rdzv-id=r7 "
        "--max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m moe_train.train run.name=big"
    )


def problems_of(value: Any, kind: str, path: str) -> list[str]:
    """What a Kubernetes object says that its published model does not know, or lacks of what it requires."""
    listed, mapped = re.fullmatch(r"list\[(.+)\]", kind), re.fullmatch(r"dict\(str, (.+)\)", kind)
    if listed or mapped:
        inner = (listed or mapped)[1]
        parts = enumerate(value) if listed else value.items()
        return [problem for key, part in parts for problem in problems_of(part, inner, f"{path}.{key}")]
    model = getattr(kubeflow, kind, None) or getattr(core, kind, None)
    if model is None:
        plain = {"str": str, "int": int, "bool": bool, "float": float, "object": object}
        return [] if isinstance(value, plain.get(kind, object)) else [f"{path}: {value!r} is no {kind}"]
    known = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
    problems = [f"{path}.{key} is unknown" for key in value.keys() - known.keys()]
    try:
        model(**{name: value.get(key) for name, key in model.attribute_map.items()})
    except ValueError as error:
        problems.append(f"{path}: {error}")
    return problems + [
        problem
        for key in value.keys() & known.keys()
        for problem in problems_of(value[key], known[key], f"{path}.{key}")
    ]


def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    return found


def test_the_kubernetes_job_is_what_the_operator_knows() -> None:
    assert problems_of(job(), "KubeflowOrgV1PyTorchJob", "job") == []


def test_a_misspelt_kubernetes_job_is_found() -> None:
    wrong = job()
    wrong["spec"]["elasticPolicy"]["maxRestart"] = 3
    pod = wrong["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["containers"][0]["volumeMounts"][0].pop("mountPath")
    pod["terminationGracePeriodSeconds"] = "long"
    assert len(problems_of(wrong, "KubeflowOrgV1PyTorchJob", "job")) == 3


def test_the_kubernetes_job_has_time_to_save_and_memory_to_share() -> None:
    worker = job()["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    policy = job()["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"], "all ranks, or none"
    ranks = int(job()["spec"]["nprocPerNode"])
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == ranks
