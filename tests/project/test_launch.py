"""Stages on several processes, as users launch them: sharded, on several hosts, from Slurm (gloo, on one CPU)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, faults
from helpers.checkout import make_checkout
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sandan.pretrain.model_and_blocks import to_blocks
from sandan.training.checkpoints import MANIFEST, newest_whole


pytestmark = pytest.mark.slow

CONFIGS = ROOT / "recipes" / "accelerate_configs"
BENCH = ROOT / "benchmarks"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SECONDS = 170
SRUN = """#!/bin/bash
# One task a host; a signal goes to all.
while [[ $1 == --* ]]; do shift; done
for host in 0 1; do SLURM_NODEID=$host "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    faults.prepare(folder)
    return folder


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def arguments(stage, folder, output):
    script, options = faults.command(stage, folder, output)
    return [script, *options]


def environment(folder, **more):
    return os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), **more}


def result(output):
    return json.loads((output / "result.json").read_text())["metrics"]


# ---- Shards ----


@pytest.mark.parametrize(
    "launch_file, stage",
    [
        ("fsdp2", "clm"),
        *(pytest.param("fsdp2", stage, marks=pytest.mark.launch) for stage in ("sft", "reward")),
        *(pytest.param("zero3", stage, marks=pytest.mark.launch) for stage in ("clm", "sft", "reward")),
    ],
)
def test_a_sharded_stage_leaves_a_whole_model(folder, launch_file, stage):
    if launch_file == "zero3":
        pytest.importorskip("deepspeed")
    output = folder / f"{launch_file}-{stage}"
    launch = [*LAUNCH, "--config_file", str(CONFIGS / f"{launch_file}.yaml"), "--num_processes", "2"]
    launch += [
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
        str(ROOT / "tests" / "helpers" / "shards_on_cpu.py"),
    ]
    done = subprocess.run(
        [*launch, *arguments(stage, folder, output)],
        check=False,
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = newest_whole(output)
    shards = "pytorch_model_fsdp_0" if launch_file == "fsdp2" else f"global_step{checkpoint.name.rpartition('-')[2]}"
    assert (checkpoint / shards).is_dir()
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model, loading = kind.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    metrics = result(output)
    if stage == "clm":
        # The weights in the folder are those that were evaluated.
        assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.5
        assert metrics["parameters"] == model.num_parameters()
        assert loss_of(model, folder, output) == pytest.approx(metrics["eval_loss"], abs=1e-3)


def loss_of(model, folder, output):
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(folder / "clm_eval.jsonl"), split="train")
    blocks = torch.tensor(to_blocks(rows, AutoTokenizer.from_pretrained(output), 32)["input_ids"][:])
    with torch.no_grad():
        return model(input_ids=blocks, labels=blocks).loss.item()


# ---- Several hosts ----


def test_two_hosts_of_one_process(folder):
    output, port = folder / "hosts", free_port()
    launchers = [
        subprocess.Popen(
            [*LAUNCH, "--config_file", str(CONFIGS / "multi_node.yaml"), "--num_machines", "2", "--num_processes", "2"]
            + ["--machine_rank", str(host), "--main_process_ip", "127.0.0.1", "--main_process_port", port]
            + ["--mixed_precision", "no", *arguments("clm", folder, output)],
            cwd=ROOT,
            env=environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for host in (0, 1)
    ]
    errors = [launcher.communicate(timeout=SECONDS)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    assert result(output)["train_steps"] == 40
    assert json.loads((newest_whole(output) / MANIFEST).read_text())["world_size"] == 2


# ---- Slurm ----


@pytest.fixture(scope="module")
def cluster(folder, tmp_path_factory):
    """A checkout with the recipe `toy`, and commands that act as Slurm's for two hosts."""
    checkout = make_checkout(tmp_path_factory.mktemp("slurm") / "checkout")
    _, *words = arguments("clm", folder, checkout / "outputs" / "toy" / "pretrain")
    options = dict(zip(words[::2], words[1::2], strict=True))
    settings = yaml.safe_load((ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text())
    settings |= {
        name.removeprefix("--"): yaml.safe_load(value) for name, value in options.items() if name != "--config"
    }
    settings |= {"data_files": [settings["data_files"]], "eval_data_files": [settings["eval_data_files"]]}
    del settings["num_train_epochs"]  # max_steps ends the run
    (checkout / "recipes" / "toy").mkdir()
    (checkout / "recipes" / "toy" / "pretrain.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 60}))
    commands = checkout / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return checkout


def submit(cluster, folder, *options):
    """Be sbatch: run the script's body on the first host, with what it finds there."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "hosts[1-2]", "SLURM_NNODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "REQUEUED": str(cluster / "requeued"), "LAUNCH_OPTIONS": "--mixed_precision no"}
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(CONFIGS / "multi_node.sbatch"), "pretrain", "toy", *options],
        cwd=cluster,
        env=environment(folder, PATH=path, PYTHON=sys.executable, **job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )


def test_a_slurm_job_that_runs_out_of_time_is_queued_again_and_goes_on(cluster, folder):
    output, requeued = cluster / "outputs" / "toy" / "pretrain", cluster / "requeued"
    requeued.unlink(missing_ok=True)
    job = submit(cluster, folder)
    deadline = time.monotonic() + SECONDS
    while not list(output.glob("checkpoint-*")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    text, _ = job.communicate(timeout=SECONDS)
    assert job.returncode != 0 and "stopped by SIGTERM; the same command goes on" in text, text[-3000:]
    assert requeued.read_text().startswith("requeue ")
    assert not (output / "result.json").exists()
    step = int(newest_whole(output).name.removeprefix("checkpoint-"))
    assert 0 < step < 60
    again = submit(cluster, folder)
    text, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0 and f"going on from {output}/checkpoint-{step}" in text, text[-3000:]
    assert result(output)["train_steps"] == 60
    assert len(requeued.read_text().splitlines()) == 1


def test_a_slurm_job_that_fails_by_a_mistake_is_not_queued_again(cluster, folder):
    (cluster / "requeued").unlink(missing_ok=True)
    job = submit(cluster, folder, "--learing_rate", "1")
    text, _ = job.communicate(timeout=SECONDS)
    assert job.returncode != 0 and "learing_rate" in text
    assert not (cluster / "requeued").exists()


# ---- What measures it ----


def bench(script, *options):
    done = subprocess.run(
        [sys.executable, str(BENCH / script), "--device", "cpu", *options],
        check=False,
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.launch
def test_weak_scaling_is_measured():
    found = bench("scaling.py", "--shape", "tiny", "--gpus", "1", "2", "--modes", "pretrain_ddp", "ppo_ddp")
    for name, pace in (("pretrain_ddp", "tokens_per_second"), ("ppo_ddp", "episodes_per_second")):
        one, two = found["results"][name]["1"], found["results"][name]["2"]
        assert two["efficiency"] == pytest.approx(two[pace] / one[pace] / 2, rel=1e-2)
    assert 0.5 < sum(found["results"]["ppo_ddp"]["2"]["shares"].values()) <= 1


@pytest.mark.launch
def test_two_processes_are_one_and_survive_the_death_of_one():
    cases = bench("scaling_faults.py", "--cases", "equal_pretrain_ddp", "equal_ppo_ddp", "faults_pretrain_ddp")[
        "cases"
    ]
    assert cases["equal_pretrain_ddp"]["largest_loss_difference"] < 1e-4
    assert cases["equal_ppo_ddp"]["first_update"]["numbers"] > 20
    assert all(cases["faults_pretrain_ddp"][kind]["bit_for_bit"] for kind in ("SIGKILL", "SIGTERM"))
