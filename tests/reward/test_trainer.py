"""The reward model's loss, its diagnostics, and the refusal of a split that leaks."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from sandan.core.errors import UserError
from sandan.reward.metrics import check_disjoint, diagnose, evaluate_pairs
from sandan.reward.trainer import GroupedRewardTrainer, GroupedSampler, prompt_weights


def pairs(prompts=6):
    """Prompts with 1, 3, 6, ... pairs, so that weighting matters."""
    made = []
    for prompt in range(prompts):
        for number in range((prompt + 1) * (prompt + 2) // 2):
            made.append(
                {"prompt_id": f"p{prompt}", "prompt": f"Q{prompt} ", "chosen": f"{'a' * (number % 4 + 1)}", "rejected": "b",
                 "margin": number % 3 + 1, "annotator": f"a{number % 2}"}
            )  # fmt: skip
    return made


def trainer_of(rows, tmp_path, tiny_config, tokenizer, **settings):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig

    torch.manual_seed(0)
    arguments = RewardConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", **settings,
    )  # fmt: skip
    return GroupedRewardTrainer(
        LlamaForSequenceClassification(tiny_config),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def loss_of(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()


def as_trl_collates(trainer):
    """The batch of [`loss_of`], padded and with repeats."""
    from trl.trainer.reward_trainer import DataCollatorForPreference

    collate = DataCollatorForPreference(trainer.processing_class.pad_token_id)
    return collate([trainer.train_dataset[index] for index in trainer._get_train_sampler()])


def test_weights_make_every_prompt_count_the_same():
    groups = [row["prompt_id"] for row in pairs()]
    weights = prompt_weights(groups)
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    by_prompt = {name: sum(w for w, g in zip(weights, groups, strict=True) if g == name) for name in set(groups)}
    assert len({round(total, 9) for total in by_prompt.values()}) == 1


@pytest.mark.parametrize("center", [None, 0.1])
def test_weighted_loss_is_the_mean_over_prompts_of_their_mean_loss(tmp_path, tiny_config, tokenizer, center):
    rows = [{key: value for key, value in row.items() if key != "margin"} for row in pairs()]
    plain = loss_of(trainer_of(rows, tmp_path, tiny_config, tokenizer, center_rewards_coefficient=center))
    weights = prompt_weights([row["prompt_id"] for row in rows])
    weighted = [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)]
    trainer = trainer_of(weighted, tmp_path, tiny_config, tokenizer, center_rewards_coefficient=center)
    found = loss_of(trainer)
    batch = as_trl_collates(trainer)
    scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    chosen, rejected = scores.detach().chunk(2)
    losses = -torch.nn.functional.logsigmoid(chosen - rejected)
    order = [weighted[index]["prompt_id"] for index in trainer._get_train_sampler()]
    by_prompt = [losses[[name == one for name in order]].mean().item() for one in set(order)]
    centering = center * (chosen + rejected).pow(2).mean().item() if center else 0.0
    assert found == pytest.approx(sum(by_prompt) / len(by_prompt) + centering, rel=1e-5)
    assert plain == pytest.approx(losses.mean().item() + centering, rel=1e-5)
    assert abs(found - plain) > 1e-4


def test_without_weights_the_loss_is_trls(tmp_path, tiny_config, tokenizer):
    from trl import RewardTrainer

    trainer = trainer_of(pairs(), tmp_path, tiny_config, tokenizer)
    found = loss_of(trainer)
    with torch.no_grad():
        expected = RewardTrainer.compute_loss(trainer, trainer.model, as_trl_collates(trainer)).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_rows_are_tokenized_as_trl_does(tmp_path, tiny_config, tokenizer):
    from trl import RewardTrainer

    turns = [[{"role": "user", "content": text}] for text in ("cow?", "frog?")]
    rows = [
        {
            "prompt": turns[number % 2],
            **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()},
        }
        for number, sides in enumerate(
            [{"chosen": "grass", "rejected": "pond"}, {"chosen": "pond", "rejected": "a"}] * 9
        )
    ]
    trainer = trainer_of(rows, tmp_path, tiny_config, tokenizer)
    expected = RewardTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, trainer.args, "train")
    assert trainer.train_dataset["chosen_ids"][:] == expected["chosen_ids"][:]
    assert trainer.train_dataset["rejected_ids"][:] == expected["rejected_ids"][:]


def test_groups_of_like_length_follow_each_other_and_stay_whole():
    random.seed(0)
    lengths = {f"p{number}": random.randint(10, 60) for number in range(300)}
    groups = [name for name in lengths for _ in range(10)]
    sampler = GroupedSampler(groups, 3, [lengths[name] for name in groups])
    order = [groups[index] for index in sampler]
    assert sorted(order) == sorted(groups)
    names = order[::10]
    assert all(order[at : at + 10] == [name] * 10 for at, name in zip(range(0, 3000, 10), names, strict=True))
    spread = [abs(lengths[a] - lengths[b]) for a, b in itertools.pairwise(names)]
    assert sum(spread) / len(spread) < 1
    sampler.set_epoch(1)
    assert [groups[index] for index in sampler] != order


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_of_like_length_train_and_are_evaluated(grouped, tmp_path, tiny_config, tokenizer):
    rows = [row if grouped else {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs()]
    trainer = trainer_of(rows, tmp_path, tiny_config, tokenizer, train_sampling_strategy="group_by_length")
    assert sorted(trainer._get_train_sampler()) == list(range(len(pairs())))
    assert trainer.train().global_step == 1
    assert math.isfinite(trainer.evaluate(Dataset.from_list(pairs(2)))["eval_loss"])


# ------------------------------------------------------------------------------------------------------- diagnostics


def simulated(count=4000, scale=1.0, seed=0):
    """Margins of a model that is calibrated if `scale` is 1: it is right with probability sigmoid(|margin|)."""
    rng = random.Random(seed)
    margins = []
    for _ in range(count):
        size = rng.expovariate(0.7)
        margins.append(size * scale * (1 if rng.random() < 1 / (1 + math.exp(-size)) else -1))
    return np.array(margins)


def rows_like(margins):
    return [{"prompt": f"Q{n // 4}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(len(margins))]


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    for scale, least, most in ((1.0, 0.0, 0.025), (3.0, 0.08, 0.5)):
        margins = simulated(scale=scale)
        found = diagnose(margins, np.zeros(len(margins)), [str(n) for n in range(len(margins))], rows_like(margins))
        assert least <= found["calibration_error"] <= most
        assert len(found["calibration"]) == 10
        inside = [one["low"] <= one["confidence"] <= one["high"] for one in found["calibration"]]
        assert sum(inside) >= 8 if scale == 1 else sum(inside) <= 4
        confidences = [one["confidence"] for one in found["calibration"]]
        assert confidences == sorted(confidences)


def test_accuracy_by_annotator_rank_difference_and_length():
    rows = [
        {
            "prompt": f"Q{n}",
            "chosen": "a",
            "rejected": "b",
            "annotator": "good" if n % 2 else "bad",
            "margin": 1 + n % 3,
        }
        for n in range(120)
    ]
    margins = np.array([1.0 if row["annotator"] == "good" else -1.0 for row in rows])
    longer = np.array([1 if n < 40 else 0 if n < 60 else -1 for n in range(120)])
    found = diagnose(margins, longer, [row["prompt"] for row in rows], rows)
    assert {name: one["mean"] for name, one in found["by_annotator"].items()} == {"good": 1.0, "bad": 0.0}
    assert {name: one["count"] for name, one in found["by_rank_difference"].items()} == {"1": 40, "2": 40, "3": 40}
    assert {name: one["count"] for name, one in found["by_length"].items()} == {
        "longer": 40,
        "same": 20,
        "shorter": 60,
    }
    assert found["human_agreement"] is None


def test_people_who_judged_the_same_answers_are_the_human_baseline():
    one = {"prompt": "Q", "chosen": "a", "rejected": "b", "annotator": "x"}
    rows = [one, one | {"annotator": "y"}, one | {"annotator": "z", "chosen": "b", "rejected": "a"}]
    found = diagnose(np.ones(3), np.zeros(3), ["Q"] * 3, rows)
    assert found["human_agreement"]["mean"] == pytest.approx(1 / 3)
    assert found["human_agreement"]["count"] == 3


def test_pairs_without_annotators_are_diagnosed_too():
    found = diagnose(np.array([1.0, -1.0]), np.zeros(2), ["a", "b"], [{"chosen": "x", "rejected": "y"}] * 2)
    assert found["by_annotator"] == found["by_rank_difference"] == {}
    assert found["calibration"]


@pytest.mark.parametrize(
    "train, held_out",
    [
        ({"prompt": "Q"}, {"prompt": "Q", "chosen": "c", "rejected": "d"}),
        ({"prompt": "Q", "prompt_id": "1", "chosen": "a"}, {"prompt": "Q", "prompt_id": "2", "chosen": "c"}),
        ({"prompt": "Q", "prompt_id": "1", "chosen": "a"}, {"prompt": "R", "prompt_id": "1", "chosen": "c"}),
        (
            {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]},
            {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_a_split_that_shares_prompts_is_refused(train, held_out):
    with pytest.raises(UserError, match="1 prompts are in the training pairs too"):
        check_disjoint([train], [held_out])


def test_a_split_by_prompt_is_taken():
    check_disjoint([{"prompt": "Q", "chosen": "a"}], [{"prompt": "R", "chosen": "a"}])
    check_disjoint([{"chosen": "a", "rejected": "b"}], [{"chosen": "c", "rejected": "d"}])


def test_the_logged_accuracy_is_that_of_the_report_although_batches_are_unequal(tmp_path, tiny_config, tokenizer):
    rows = [{key: value for key, value in row.items() if key != "margin"} for row in pairs(4)]
    trainer = trainer_of(rows, tmp_path, tiny_config, tokenizer, per_device_eval_batch_size=6, max_length=64)
    long = {"prompt_id": "long", "prompt": "Q", "chosen": "a" * 500, "rejected": "b"}
    held_out = [*rows[:13], long]
    dataset = trainer._prepare_dataset(Dataset.from_list(held_out), tokenizer, trainer.args, "eval")
    logged = trainer.evaluate(dataset)
    measured, _ = evaluate_pairs(trainer.model, tokenizer, held_out, "none", max_length=64)
    assert logged["eval_accuracy"] == pytest.approx(measured["eval_accuracy"])
    assert logged["eval_margin"] == pytest.approx(measured["mean_margin"], rel=1e-4, abs=1e-6)
    assert 0 < measured["eval_accuracy"] < 1
