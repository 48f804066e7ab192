"""Which rows a step of pretraining sees: the same on one process and on two (gloo), with workers, and when resumed."""

import json
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from helpers.scripts import run_on_two_ranks
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sandan.pretrain.masking import BlockCollator
from sandan.pretrain.order import OrderedTrainer, StepSampler


# 22 rows are 5 whole steps: the sixth step begins the second epoch.
ROWS, ROWS_PER_STEP, STEPS, SAVED = 22, 4, 8, 7
TINY = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
)


class Seen(OrderedTrainer):
    """Notes the rows of each step, over all processes."""

    def training_step(self, model, inputs, *args, **kwargs):
        rows = gather_object(inputs["input_ids"][:, 0].tolist())
        self.seen[str(self.state.global_step)] = sorted(self.seen.get(str(self.state.global_step), []) + rows)
        return super().training_step(model, inputs, *args, **kwargs)


def rows_of_steps(folder, start=None, **settings):
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=SAVED,
        seed=3,
        **settings,
    )
    rows = Dataset.from_dict({"input_ids": [[row, 1, 2, 3] for row in range(ROWS)]}).with_format("numpy")
    trainer = Seen(LlamaForCausalLM(TINY), args, BlockCollator(), rows)
    trainer.seen = {}
    trainer.train(resume_from_checkpoint=start)
    return trainer.seen


def resumed(folder, **settings):
    return rows_of_steps(folder, start=str(folder / f"checkpoint-{SAVED}"), **settings)


@pytest.fixture(scope="module")
def expected():
    """What the sampler says, without any trainer."""
    found, sampler = [], StepSampler(ROWS, ROWS_PER_STEP, seed=3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        found += [sorted(rows[first : first + ROWS_PER_STEP]) for first in range(0, len(rows), ROWS_PER_STEP)]
    return {str(step): rows for step, rows in enumerate(found[:STEPS])}


def test_epochs_are_whole_steps_of_distinct_rows():
    epochs = []
    for epoch in range(2):
        sampler = StepSampler(ROWS, ROWS_PER_STEP, seed=3)
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(set(epochs[-1])) == len(sampler) == 20
    assert set(epochs[0]) != set(epochs[1])
    assert sorted(StepSampler(3, ROWS_PER_STEP, seed=3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
    ],
)
def test_one_process(tmp_path, expected, settings):
    assert rows_of_steps(tmp_path, **settings) == expected
    assert resumed(tmp_path, **settings) == {str(SAVED): expected[str(SAVED)]}


def on_two_processes(folder):
    whole = {"per_device_train_batch_size": 2}
    shared = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    return {
        "whole": rows_of_steps(folder / "whole", **whole),
        "shared": rows_of_steps(folder / "shared", **shared),
        "resumed": resumed(folder / "whole", **whole),
    }


@pytest.mark.slow
def test_two_processes(tmp_path, expected):
    """The resumed run begins in the middle of the second epoch."""
    done = run_on_two_ranks(__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["whole"] == found["shared"] == expected
    assert found["resumed"] == {str(SAVED): expected[str(SAVED)]}


if __name__ == "__main__":
    seen = on_two_processes(Path(sys.argv[1]))
    if PartialState().is_main_process:
        Path(sys.argv[1], "found.json").write_text(json.dumps(seen))
    PartialState().destroy_process_group()
