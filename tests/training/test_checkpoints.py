"""Runs that are killed, starved of disk or given broken checkpoints (the long matrix is `make test-faults`)."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import TEXTS, faults
from helpers.disk import fillable
from helpers.scripts import run_on_two_ranks, run_processes
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from sandan.core import signals
from sandan.core.errors import Interrupted, UserError
from sandan.core.files import sha256
from sandan.core.stage import Stage
from sandan.pretrain.masking import BlockCollator, ReproducibleMasking
from sandan.run import cli
from sandan.training import checkpoints
from sandan.training.checkpoints import MANIFEST, choose, newest_whole, numbered, problem_of
from sandan.training.train_and_save import train
from sandan.training.trainer import GuardedTrainer


ROWS = 24


def build(folder, config, tokenizer, callbacks=(), rows=None, **kwargs):
    """A trainer of a toy's size; keywords go to `TrainingArguments`."""
    torch.manual_seed(0)
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    ids = [[4 + (7 * row + 3 * column) % 300 for column in range(16)] for row in range(ROWS)]
    return GuardedTrainer(
        LlamaForCausalLM(config),
        TrainingArguments(**settings | kwargs),
        BlockCollator(),
        Dataset.from_dict({"input_ids": ids if rows is None else rows}),
        Dataset.from_dict({"input_ids": ids[:4]}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.fixture
def make(tmp_path, tiny_config, tokenizer):
    return functools.partial(build, tmp_path / "run", tiny_config, tokenizer)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, tiny_config, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "run"
    build(folder, tiny_config, tokenizer).train()
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A run of 6 steps with checkpoints 2, 4 and 6."""
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


@pytest.fixture
def handled():
    with signals.handled():
        yield


class At(TrainerCallback):
    """Do something at an event of a step."""

    def __init__(self, event, step, action):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action()

        setattr(self, event, act)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def weights(trainer):
    return [one.detach().clone() for one in trainer.model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- The matrix, short ----


@pytest.mark.slow
@pytest.mark.parametrize("stages, kinds", [(["clm", "ppo"], faults.KINDS), (["mlm", "sft", "reward"], ["SIGKILL"])])
def test_killed_runs_go_on_bit_for_bit(tmp_path, stages, kinds):
    """All ways to die for a loop of transformers and our own; one way for the stages that share the first one."""
    options = ["--kills", 1, "--seed", 7, "--stages", *stages, "--kinds", *kinds]
    done = run_processes([{}], faults.__file__, tmp_path / "faults", *options, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 of 1 went on bit for bit") == len(stages) * len(kinds)
    # Not all of them began anew.
    assert len(re.findall(r"left .*checkpoint-", done.stdout)) >= len(stages) * len(kinds) // 3


# ---- Checkpoints ----


def test_a_checkpoint_says_what_it_is_made_of(saved):
    manifest = json.loads((saved / "checkpoint-6" / MANIFEST).read_text())
    names = {path.name for path in (saved / "checkpoint-6").iterdir()} - {MANIFEST}
    assert set(manifest["files"]) == names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert (manifest["step"], manifest["world_size"], manifest["train_rows"]) == (6, 1, ROWS)
    assert manifest["settings"]["per_device_train_batch_size"] == 2
    assert "output_dir" not in manifest["settings"] and "logging_steps" not in manifest["settings"]
    assert [path.name for path in saved.glob(".*")] == []


BREAKAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "bit-flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
    ),
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_state.json")


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(saved, name, breakage, caplog):
    broken = saved / "checkpoint-6"
    BREAKAGES[breakage](broken / name)
    if name == MANIFEST and breakage == "bit-flipped":
        (broken / MANIFEST).write_text((broken / MANIFEST).read_text().replace('"size": ', '"size": 1'))
    assert newest_whole(saved).name == "checkpoint-4"
    assert not broken.exists() and (saved / "checkpoint-6.broken").is_dir()
    (record,) = caplog.records
    assert "checkpoint-6: " in record.message and "set aside as checkpoint-6.broken" in record.message
    assert name in record.message


def listed(folder, change):
    """Change the files that a manifest lists."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_that_lists_too_little_does_not_make_other_files_whole(saved, name):
    folder = saved / "checkpoint-6"
    listed(folder, lambda files: files.pop(name))
    assert problem_of(folder) == f"{name} is not in {MANIFEST}"
    (folder / name).unlink()
    assert f"{MANIFEST} lists no " in problem_of(folder) and name.split(".")[-1] in problem_of(folder)


@pytest.mark.parametrize("files", [{}, {"model.safetensors": 3}, {"model.safetensors": {"size": 1}}, [], None])
def test_an_edited_manifest_is_refused(make, saved, files):
    folder = saved / "checkpoint-6"
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
    with pytest.raises(UserError, match=MANIFEST):
        choose(saved, str(folder), make().run_identity(), finished=False, anyway=False)
    assert newest_whole(saved).name == "checkpoint-4"


def seal_again(folder, name, content):
    """Exchange a file, as somebody does who knows the manifest."""
    content(folder / name)
    listed(folder, lambda files: files.update({name: entry(folder / name)}))


def entry(path):
    return {"size": path.stat().st_size, "sha256": sha256(path)}


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("optimizer.pt", {}, "holds something else than this run saves"),
        ("optimizer.pt", [1], "holds something else than this run saves"),
        ("scheduler.pt", 3, "holds something else than this run saves"),
        ("rng_state.pth", {}, "holds something else than this run saves"),
        ("run_state.json", "[]", "run_state.json is no JSON object"),
        ("run_state.json", "{", "run_state.json is no JSON object"),
        ("run_state.json", "{}", "holds something else than this run saves"),
        ("trainer_state.json", "[]", "trainer_state.json is no JSON object"),
        ("trainer_state.json", '{"global_step": 99}', "trainer_state.json is of step 99"),
    ],
)
def test_a_file_that_was_exchanged_is_one_line(make, saved, name, content, said):
    def write(path):
        if path.suffix == ".json":
            path.write_text(content)
        else:
            torch.save(content, path)

    folder = saved / "checkpoint-4"
    seal_again(folder, name, write)
    with pytest.raises(UserError, match=f"checkpoint-4: {said}"):
        run = make()
        start = choose(saved, str(folder), run.run_identity(), finished=False, anyway=False)
        run.train(resume_from_checkpoint=str(start))


def test_a_manifest_of_another_step_is_refused(saved):
    manifest = json.loads((saved / "checkpoint-4" / MANIFEST).read_text())
    (saved / "checkpoint-4" / MANIFEST).write_text(json.dumps(manifest | {"step": 7}))
    assert problem_of(saved / "checkpoint-4") == f"{MANIFEST} is of step 7"


def test_a_broken_folder_that_is_empty_or_half_made_is_no_checkpoint(saved):
    (saved / "checkpoint-8").mkdir()
    (saved / ".saving" / "checkpoint-10").mkdir(parents=True)
    assert newest_whole(saved).name == "checkpoint-6"
    assert (saved / "checkpoint-8.broken").is_dir()


def test_a_run_goes_on_after_its_newest_checkpoint_was_broken(make, saved):
    whole = make(output_dir=str(saved.parent / "whole"))
    whole.train()
    BREAKAGES["bit-flipped"](saved / "checkpoint-6" / "model.safetensors")
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(whole), weights(resumed))
    assert [folder.name for _, folder in numbered(saved)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_rotation_keeps_whole_checkpoints_and_never_counts_broken_ones(make, saved):
    (saved / "checkpoint-9.broken").mkdir()
    make(save_total_limit=2, max_steps=12).train(resume_from_checkpoint=str(saved / "checkpoint-6"))
    assert [folder.name for _, folder in numbered(saved)] == ["checkpoint-10", "checkpoint-12"]
    assert (saved / "checkpoint-9.broken").is_dir()


def test_the_best_checkpoint_survives_rotation_under_its_name(make, saved):
    run = make(
        save_total_limit=1,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=5.0,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == saved and best.is_dir() and problem_of(best) is None


def test_a_new_run_puts_earlier_checkpoints_aside_instead_of_mixing_them(make, saved):
    make(max_steps=2).train()
    assert [folder.name for _, folder in numbered(saved)] == ["checkpoint-2"]
    assert {path.name for path in saved.glob("*.previous")} == {f"checkpoint-{n}.previous" for n in (2, 4, 6)}


# ---- Which checkpoint ----


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"learning_rate": 1e-4}, "learning_rate: 5e-05 there, 0.0001 now"),
        ({"seed": 3}, "seed: 42 there, 3 now"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 there, 2 now"),
        ({"max_steps": 60}, "max_steps: 6 there, 60 now"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 there, 1 now"),
        ({"rows": [[5] * 16] * 9}, f"train_rows: {ROWS} there, 9 now"),
    ],
)
def test_another_run_is_refused_with_the_reason_and_the_ways_out(make, saved, change, wanted):
    identity = make(**change).run_identity()
    with pytest.raises(UserError) as caught:
        choose(saved, "auto", identity, finished=False, anyway=False)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    assert "--resume never" in str(caught.value) and "--resume_with_changes" in str(caught.value)
    assert choose(saved, "auto", identity, finished=False, anyway=True).name == "checkpoint-6"
    assert choose(saved, "never", identity, finished=False, anyway=False) is None


def test_changed_data_and_world_size_are_refused(make, saved):
    identity = make().run_identity()
    for change, wanted in (
        ({"world_size": 2}, "world_size: 1 there, 2 now"),
        ({"inputs": {"a.jsonl": "12"}}, "a.jsonl: other content"),
    ):
        with pytest.raises(UserError, match=wanted):
            choose(saved, "auto", identity | change, finished=False, anyway=False)


def test_settings_that_change_no_weight_do_not_matter(make, saved):
    changed = make(logging_steps=3, save_steps=3, run_name="x", output_dir=str(saved.parent / "elsewhere"))
    assert choose(saved, "auto", changed.run_identity(), finished=False, anyway=False).name == "checkpoint-6"
    assert choose(saved, "auto", changed.run_identity(), finished=True, anyway=False) is None


@pytest.mark.parametrize(
    "path, wanted",
    [("nowhere", "no such folder"), ("checkpoint-4", "optimizer.pt is missing"), (".", "no MANIFEST.json")],
)
def test_a_named_checkpoint_must_be_whole(make, saved, path, wanted):
    (saved / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=wanted):
        choose(saved, str(saved / path), make().run_identity(), finished=False, anyway=False)
    with pytest.raises(ValueError, match="MANIFEST" if path == "nowhere" else wanted):
        make().train(resume_from_checkpoint=str(saved / path))


class Payload:
    """Runs a command when it is unpickled (after Composer's test of malicious checkpoints)."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_malicious_pickle_in_a_checkpoint_does_not_run(make, saved, name, tmp_path):
    folder = saved / "checkpoint-4"
    torch.save(Payload(tmp_path / "owned"), folder / name)
    # The attacker writes the manifest too.
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": checkpoints.sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert problem_of(folder) is None
    if name == "training_args.bin":
        make().train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(UserError, match="checkpoint-4: .*refused"):
            make().train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "owned").exists()


# ---- Signals ----


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(make, tmp_path, handled):
    whole = make(save_strategy="no", output_dir=str(tmp_path / "whole"))
    whole.train()
    with pytest.raises(Interrupted, match="SIGTERM"):
        make([At("on_pre_optimizer_step", 2, terminate)], save_strategy="no").train()
    assert newest_whole(tmp_path / "run").name == "checkpoint-3"
    signals._received = None
    resumed = make(save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(whole), weights(resumed))
    assert resumed.mean_train_loss() == pytest.approx(whole.mean_train_loss(), abs=1e-12)


def test_a_signal_in_an_evaluation_leaves_it_at_once_and_it_is_made_up_for(make, tmp_path, handled):
    options = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    whole = make(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    batches = []

    class SignalInEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            batches.append(state.global_step)
            if len(batches) == 2:
                terminate()

    stopped = make([SignalInEvaluation()], **options)
    with pytest.raises(Interrupted):
        stopped.train()
    assert len(batches) in (2, 3)  # of 4
    assert newest_whole(tmp_path / "run").name == "checkpoint-3"
    signals._received = None
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(whole), weights(resumed))

    def evaluations(trainer):
        return [(one["step"], one["eval_loss"]) for one in trainer.state.log_history if "eval_loss" in one]

    assert evaluations(whole) == evaluations(resumed) and len(evaluations(whole)) == 2


def test_a_signal_in_a_save_waits_for_it(make, tmp_path, handled):
    run = make([At("on_save", 2, terminate)])
    with pytest.raises(Interrupted):
        run.train()
    assert [folder.name for _, folder in numbered(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]


def test_without_a_trainer_a_signal_ends_the_stage_at_once(handled):
    with pytest.raises(Interrupted, match="SIGINT"):
        signal.raise_signal(signal.SIGINT)


def test_a_finished_run_that_is_resumed_makes_no_further_step(make, saved):
    finished = make()
    finished.train(resume_from_checkpoint=str(saved / "checkpoint-6"))
    assert finished.state.global_step == 6
    assert equal(weights(finished), stored_weights(make, saved))


def stored_weights(make, saved):
    from safetensors.torch import load_file

    stored = load_file(saved / "checkpoint-6" / "model.safetensors")
    return [stored[name] for name, _ in make().model.named_parameters()]


# ---- Numbers that are not finite ----


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_step_and_saves_nothing(make, tmp_path, where):
    run = make()

    def spoil():
        if where == "weights":
            with torch.no_grad():
                next(run.model.parameters()).view(-1)[:] = float("nan")
        else:
            next(run.model.parameters()).register_hook(lambda grad: grad * float("inf"))

    run.add_callback(At("on_step_begin", 3, spoil))
    with pytest.raises(FloatingPointError) as caught:
        run.train()
    message = str(caught.value)
    suspect = {"weights": "micro-batch 1 of 1, rank 0", "gradient": "each of its micro-batches on rank 0 is finite"}
    assert message.startswith("step 4 (epoch ") and suspect[where] in message and "begins '" in message
    assert newest_whole(tmp_path / "run").name == "checkpoint-2"
    assert run.args.logging_nan_inf_filter is False


def test_training_never_uses_the_attention_kernel_whose_gradient_can_be_nan(make):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_batch_without_any_label_has_loss_0(make, tokenizer):
    run = make(max_steps=2)
    run.data_collator = ReproducibleMasking(tokenizer, mlm_probability=0.0)
    run.train()
    assert [one["loss"] for one in run.state.log_history if "loss" in one] == [0.0, 0.0]


# ---- Disk ----


@pytest.fixture
def small_files():
    with fillable() as fill:
        yield fill


def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_of_a_new_one(make, tmp_path, small_files):
    run = make([At("on_step_begin", 3, small_files)])
    with pytest.raises(UserError) as caught:
        run.train()
    assert "checkpoint-4: cannot be saved (" in str(caught.value) and "\n" not in str(caught.value)
    assert "checkpoint-2 is whole" in str(caught.value)
    folder = tmp_path / "run"
    assert [one.name for _, one in numbered(folder)] == ["checkpoint-2"] and not (folder / ".saving").exists()
    assert problem_of(folder / "checkpoint-2") is None


@pytest.mark.parametrize("written", ["optimizer.pt", "rng_state.pth", "run_state.json", MANIFEST])
def test_no_space_at_any_file_is_one_line(make, tmp_path, written, monkeypatch):
    """`/dev/full` answers every write with ENOSPC."""
    run = make()

    def fill():
        folder = tmp_path / "run" / ".saving" / "checkpoint-4"
        folder.mkdir(parents=True)
        (folder / written).symlink_to("/dev/full")
        # The folder is cleared before a save: not this time.
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: monkeypatch.undo())

    run.add_callback(At("on_step_begin", 3, fill))
    with pytest.raises(UserError, match="checkpoint-4: cannot be saved"):
        run.train()
    assert newest_whole(tmp_path / "run").name == "checkpoint-2"
    assert not (tmp_path / "run" / ".saving").exists()


def test_a_read_only_folder_is_one_line(make, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = make([At("on_step_begin", 3, lambda: monkeypatch.setattr(Path, "rename", refuse))])
    with pytest.raises(UserError, match="checkpoint-4: cannot be saved .Read-only file system"):
        run.train()
    monkeypatch.undo()
    assert newest_whole(tmp_path / "run").name == "checkpoint-2"


def test_room_is_asked_for_before_the_start(make, tmp_path, monkeypatch):
    run, stage = make(), Stage("sft", "tiny", tmp_path / "run", 0, {}).open()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"a checkpoint and the final model take about .* kB, but only 1 kB are free"):
        train(run, stage)
    assert run.state.global_step == 0


# ---- Several ranks ----


def test_a_folder_that_cannot_be_changed_ends_every_rank_before_the_first_step(make, saved, monkeypatch):
    def refuse():
        raise UserError("read-only")

    main, other = make(), make()
    main.before_writing = refuse
    with pytest.raises(UserError, match="read-only"):
        main.train()
    monkeypatch.setattr("sandan.training.trainer.on_any_rank", lambda accelerator, flag: True)
    other._writes = False
    with pytest.raises(UserError, match="another rank could not write"):
        other.begin_writing()
    assert main.state.global_step == 0


def on_two_ranks(folder, moment):
    """Run on each of two ranks: only rank 1 gets the signal, or the bad number; what each rank saw is written down."""
    from sandan.pretrain.tokenizer import train_tokenizer

    rank = os.environ["RANK"]
    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=320)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, **sizes, **special)
    options = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    whole = build(folder / "whole", config, tokenizer, **options)
    whole.train()
    run = build(folder / "run", config, tokenizer, **options)
    if rank == "1":
        event = {"step": "on_pre_optimizer_step", "evaluation": "on_prediction_step", "nan": "on_step_begin"}[moment]
        run.add_callback(At(event, 2, terminate if moment != "nan" else lambda: spoil(run)))
    seen = "finished"
    with signals.handled():
        try:
            run.train()
        except (Interrupted, FloatingPointError) as error:
            seen = f"{type(error).__name__}: {error}"
    step = run.state.global_step
    same = None
    if moment != "nan":
        resumed = build(folder / "run", config, tokenizer, **options)
        resumed.train(resume_from_checkpoint=True)
        same = equal(weights(whole), weights(resumed))
    (folder / f"{rank}.json").write_text(json.dumps({"seen": seen, "step": step, "same": same}))


def spoil(trainer):
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[:] = float("nan")


@pytest.mark.slow
@pytest.mark.parametrize("moment, step", [("step", 3), ("evaluation", 2), ("nan", 2)])
def test_all_ranks_stop_together_where_one_must(tmp_path, moment, step):
    done = run_on_two_ranks(__file__, tmp_path, moment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["step"] for one in ranks] == [step, step]
    if moment == "nan":
        assert ranks[1]["seen"].startswith("FloatingPointError: step 3 ") and "rank 1" in ranks[1]["seen"]
        assert ranks[0]["seen"].startswith("FloatingPointError: step 3 ")
        assert newest_whole(tmp_path / "run") is None
    else:
        assert all(one["seen"].startswith("Interrupted") for one in ranks)
        manifest = json.loads((tmp_path / "run" / f"checkpoint-{step}" / MANIFEST).read_text())
        assert manifest["world_size"] == 2 and "rng_state_1.pth" in manifest["files"]
        # What the run that was stopped and the one that was not agree in: dropout, data order, evaluation.
        assert [one["same"] for one in ranks] == [True, True]


if __name__ == "__main__":
    cli.guarded(lambda: on_two_ranks(Path(sys.argv[1]), sys.argv[2]))
