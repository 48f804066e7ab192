"""Scripts as people write them for TRL's PPOTrainer, with only the import changed."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from helpers.tiny_ppo import (
    SIZES,
    make_classifier,
    make_dataset,
    make_policy,
    make_tokenizer,
    share_of_w5,
    tiny,
    updates,
)
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    TextClassificationPipeline,
    TrainerCallback,
)

from sandan import PPOConfig, PPOTrainer


__all__ = ["tiny"]

SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "total_episodes": 8,
    "num_ppo_epochs": 2,
    "response_length": 6,
    "num_sample_generations": 0,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def config(tmp_path):
    return lambda **kwargs: PPOConfig(output_dir=str(tmp_path / "run"), **SMALL | kwargs)


@pytest.fixture
def script(config):
    """Build the trainer as TRL's example does, with keywords that the script changes."""

    def make(settings=None, **changed):
        return PPOTrainer(
            **{
                "args": config(**settings or {}),
                "processing_class": make_tokenizer(),
                "model": make_policy(),
                "ref_model": make_policy(),
                "reward_model": make_classifier(),
                "value_model": make_classifier(),
                "train_dataset": make_dataset(16),
                **changed,
            }
        )

    return make


def lora(model, task=TaskType.SEQ_CLS, **kwargs):
    targets = ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=targets, **kwargs))


def state(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def changed(before, module):
    return {name for name, weight in module.named_parameters() if not torch.equal(before[name], weight.detach())}


# ---- The call ----


def test_arguments_may_be_in_the_order_of_trl(config):
    policy, reference, reward, critic = make_policy(), make_policy(), make_classifier(), make_classifier(2)
    trainer = PPOTrainer(config(), make_tokenizer(), policy, reference, reward, make_dataset(16), critic, None, None)
    assert trainer.policy_model is policy and trainer.ref_model is reference
    assert trainer.reward_model is reward and trainer.value_model is critic
    trainer.train()


def test_names_of_trl_0_12_are_taken(config):
    policy, reference = make_policy(), make_policy()
    trainer = PPOTrainer(
        config=config(exp_name="mine"),
        tokenizer=make_tokenizer(),
        policy=policy,
        ref_policy=reference,
        reward_model=make_classifier(),
        train_dataset=make_dataset(16),
    )
    assert trainer.policy_model is policy and trainer.ref_model is reference
    assert trainer.args.run_name == "mine"
    assert trainer.stop_token_id == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda args: PPOTrainer(args, make_policy(), None, make_tokenizer()), "sandan.legacy"),
        (lambda args: PPOTrainer(args=args, model=make_policy(), dataset=make_dataset()), "^dataset: .*sandan.legacy"),
        (lambda args: PPOTrainer(object(), make_policy()), "model: expected a causal LM or a path, found object"),
        (lambda args: PPOTrainer(args=args, model=ValueHeadModel()), "model: a value-head model .*sandan.legacy"),
        (lambda args: PPOTrainer(args=args, config=args), "config: given twice, also as args"),
        (lambda args: PPOTrainer(args=args, model=make_policy(), policy=make_policy()), "policy: given twice"),
        (lambda args: PPOTrainer(make_policy(), share_of_w5, {"lr": 1}), "args: expected a sandan.PPOConfig, found"),
        (lambda args: PPOTrainer(args=args, modell=make_policy()), "modell"),
        (lambda args: PPOConfig(model_name="gpt2"), "^model_name: .*sandan.legacy"),
        (lambda args: PPOConfig(ppo_epochs=4), "ppo_epochs: .*num_ppo_epochs"),
    ],
)
def test_a_call_for_another_trainer_is_one_line(config, call, words):
    with pytest.raises(TypeError, match=words) as caught:
        call(config())
    assert "\n" not in str(caught.value)


def test_old_methods_point_to_their_place(script):
    trainer = script()
    with pytest.raises(AttributeError, match=r"PPOTrainer.step: .*sandan\.legacy"):
        trainer.step([], [], [])
    with pytest.raises(AttributeError, match="no attribute 'stepp'"):
        _ = trainer.stepp
    assert not hasattr(trainer, "generate")


def test_settings_tell_their_derived_sizes_afterwards(script, config):
    args = config(gradient_accumulation_steps=2, num_mini_batches=2)
    script(args=args).train()
    sizes = (args.batch_size, args.local_batch_size, args.mini_batch_size, args.local_mini_batch_size)
    assert sizes == (8, 8, 4, 4)
    assert (args.micro_batch_size, args.num_total_batches, args.world_size) == (4, 1, 1)
    assert args.gradient_accumulation_steps == 2
    without = config(total_episodes=None, num_train_epochs=2)
    script(args=without)
    assert (without.total_episodes, without.num_total_batches) == (32, 8)
    assert script(args=without).args.num_total_batches == 8  # the same settings again


# ---- Logs ----


class ReadsLogs(TrainerCallback):
    """Reads the last log in every step, as TRL's users do."""

    NAMES = (
        "objective/kl",
        "objective/scores",
        "policy/approxkl_avg",
        "loss/value_avg",
        "val/ratio",
        "lr",
        "episode",
        "eps",
    )

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append({name: state.log_history[-1][name] for name in self.NAMES})


@pytest.mark.parametrize("settings", [{}, {"logging_steps": 100}, {"eval_strategy": "steps", "eval_steps": 2}])
def test_a_callback_reads_the_update_in_every_step(script, settings):
    callback = ReadsLogs()
    trainer = script({"total_episodes": 12, **settings}, callbacks=[callback], eval_dataset=make_dataset(4))
    trainer.train()
    assert [seen["episode"] for seen in callback.seen] == [4, 4, 8, 8, 12, 12]
    logged = updates(trainer)
    assert [entry["step"] for entry in logged] == ([] if "logging_steps" in settings else [2, 4, 6])
    for entry, seen in zip(logged, callback.seen[1::2], strict=False):
        assert {name: entry[name] for name in seen if name != "eps"} == {
            name: seen[name] for name in seen if name != "eps"
        }


def test_over_optimisation_study_with_callbacks(script):
    class Stops(TrainerCallback):
        curve = ()

        def on_step_end(self, args, state, control, **kwargs):
            log = state.log_history[-1]
            self.curve = (*self.curve, (log["objective/kl"], log["objective/scores"]))
            control.should_training_stop = len(self.curve) >= 3

    stops = Stops()
    trainer = script({"total_episodes": 32}, callbacks=[stops], reward_model=share_of_w5)
    trainer.train()
    assert trainer.state.global_step == 4  # the end of the second update
    assert stops.curve[0][0] == pytest.approx(0, abs=1e-5)


def test_the_variance_of_the_ratio_is_never_negative(script):
    trainer = script({"learning_rate": 1e-9, "total_episodes": 16})
    trainer.train()
    assert all(entry["val/ratio_var"] >= 0 for entry in updates(trainer))


# ---- Data ----


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([3 + index, 4, 5])}


@pytest.mark.slow
def test_data_in_every_form_make_the_same_run(script):
    plain = Dataset.from_dict({"input_ids": [[3 + index, 4, 5] for index in range(16)]})
    formatted = copy.deepcopy(plain)
    formatted.set_format("torch")
    finals = []
    lazy = Dataset.from_dict({"first": list(range(16))})
    lazy = lazy.with_transform(lambda rows: {"input_ids": [[3 + first, 4, 5] for first in rows["first"]]})
    for dataset in (plain, formatted, plain.with_format("numpy"), lazy, plain.to_list(), Rows()):
        trainer = script(train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        trainer.evaluate(dataset)
        finals.append(updates(trainer)[-1]["objective/scores"])
    assert len(set(finals)) == 1


def test_columns_of_torch_data_reach_a_reward_as_plain_values(script):
    dataset = make_dataset(16).add_column("target", list(range(16))).with_format("torch")

    def near(prompts, completions, target):
        assert all(type(one) is int for one in target)
        return [0.0 for _ in target]

    script(train_dataset=dataset, reward_model=near).train()


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (make_dataset().to_iterable_dataset(), "train_dataset: .*not streamed.*stream.take"),
        ({"train": make_dataset()}, "train_dataset: .*with 'train'"),
        ("imdb", "train_dataset: .*found str"),
        (iter([]), "train_dataset: .*found list_iterator"),
    ],
)
def test_other_data_are_one_line_that_names_the_argument(script, dataset, words):
    with pytest.raises(TypeError, match=words):
        script(train_dataset=dataset)


def test_completions_without_evaluation_data_are_none(script):
    trainer = script()
    trainer.train()
    assert trainer.generate_completions() == []


# ---- Rewards ----


class LogitsReward(nn.Module):
    """A module of one's own whose forward gives `.logits`; it has no config."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 1)

    def forward(self, input_ids, attention_mask=None):
        scores = (self.table(input_ids)[..., 0] * attention_mask).sum(1, keepdim=True)
        return type("Output", (), {"logits": scores})


class BareReward(LogitsReward):
    def forward(self, input_ids):
        return self.table(input_ids)[:, 0, 0]


class TrlReward(nn.Module):
    """A module in TRL's form: TRL calls the backbone under `base_model_prefix`, then `score`."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = LlamaModel(LlamaConfig(**SIZES))

    def score(self, hidden):
        return hidden.mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", [LogitsReward, BareReward, TrlReward, lambda: lora(make_classifier())])
def test_modules_are_read_as_models(script, kind):
    reward = kind()
    trainer = script(reward_model=reward)
    assert trainer.reward_model is reward
    trainer.train()
    rollout = trainer.sample([trainer.train_dataset[index] for index in range(4)], seed=0)
    together = trainer.score(rollout)[:, 0]
    for index, row in enumerate(rollout.rows):
        ids = torch.tensor([row["input_ids"] + list(rollout.completions[index].token_ids)])
        if isinstance(reward, TrlReward):
            alone = reward.score(reward.model(ids).last_hidden_state)[0, -1, 0]
        else:
            found = (
                reward(input_ids=ids) if isinstance(reward, BareReward) else reward(ids, torch.ones_like(ids)).logits
            )
            alone = found.reshape(())
        assert together[index].item() == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda: make_classifier(num_labels=2), r"its .logits are \(2, 2\) for 2 rows"),
        (make_policy, r"its .logits are \(2, 2, 64\)"),
        (lambda: nn.Linear(3, 1), "a Linear, so it gets input_ids and attention_mask"),
        (lambda: 3.0, "reward_funcs: found float"),
        (lambda: lambda: [1.0], "takes no prompts and completions"),
        (lambda: lambda prompts, completions, answer: [1.0], "needs answer, but the training data has the columns"),
    ],
)
def test_a_reward_that_cannot_work_is_one_line_before_the_first_rollout(script, reward, words):
    with pytest.raises(ValueError, match=words):
        script(reward_model=reward())


class Scorer:
    def __call__(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])


@pytest.mark.parametrize(
    "reward",
    [
        lambda prompts, completions: [len(text) for text in completions],
        lambda completions, prompts: [len(text) for text in completions],
        lambda completions, **kwargs: [len(text) for text in completions],
        lambda a, b: [len(text) for text in b],
        lambda texts: [len(text) for text in texts],
        lambda **kwargs: [len(text) for text in kwargs["completions"]],
        Scorer(),
    ],
)
def test_functions_of_every_kind_get_the_completions(script, reward):
    trainer = script(reward_model=reward)
    rollout = trainer.sample([trainer.train_dataset[index] for index in range(4)], seed=0)
    assert trainer.score(rollout)[:, 0].tolist() == [len(answer.text) for answer in rollout.completions]


def sentiment_pipeline(labels=("NEGATIVE", "POSITIVE")):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}
    settings = DistilBertConfig(**sizes, num_labels=len(labels), id2label=names)
    return TextClassificationPipeline(model=DistilBertForSequenceClassification(settings), tokenizer=make_tokenizer())


def test_a_sentiment_pipeline_is_a_reward(script, caplog):
    pipe = sentiment_pipeline()
    with caplog.at_level(logging.WARNING, logger="sandan"):
        trainer = script(reward_model=pipe, value_model=None)
    assert "the logit of POSITIVE for prompt + completion" in caplog.text
    assert trainer.reward_model is pipe
    trainer.train()
    rollout = trainer.sample([trainer.train_dataset[index] for index in range(4)], seed=0)
    texts = [make_tokenizer().decode(row["input_ids"]) for row in rollout.rows]
    texts = [text + answer.text for text, answer in zip(texts, rollout.completions, strict=True)]
    rows = pipe(texts, top_k=None, function_to_apply="none")
    wanted = [next(one["score"] for one in row if one["label"] == "POSITIVE") for row in rows]
    assert trainer.score(rollout)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="none is the positive one"):
        script(reward_model=sentiment_pipeline(("a", "b", "c")))


# ---- Critics ----


class ValueHeadModel(nn.Module):
    """A value-head model in the style of TRL 0.11."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = make_policy()
        self.v_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 1))


class OtherPrefix(nn.Module):
    base_model_prefix = "trunk"

    def __init__(self, trunk=None):
        super().__init__()
        self.trunk = trunk or LlamaModel(LlamaConfig(**SIZES))
        self.score = nn.Linear(32, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ValueHeadModel, OtherPrefix, lambda: lora(make_classifier())])
def test_critics_of_other_kinds_learn_and_resume(script, kind, tmp_path):
    torch.manual_seed(5)
    made, settings = kind(), {"save_strategy": "steps", "save_steps": 2, "total_episodes": 16}
    whole = script(settings, value_model=copy.deepcopy(made))
    before = state(whole.value_model)
    whole.train()
    assert changed(before, whole.value_model)
    resumed = script(settings, value_model=copy.deepcopy(made))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert changed(state(whole.value_model), resumed.value_model) == set()


@pytest.mark.parametrize(
    "critic",
    [lambda: sentiment_pipeline().model, make_policy, lambda: make_classifier(num_labels=2), lambda: nn.Linear(3, 1)],
)
def test_a_critic_without_values_is_one_line(script, critic):
    with pytest.raises(ValueError, match=r'value_model: .*critic_backbone="policy"'):
        script(value_model=critic())


def test_a_frozen_critic_stays_frozen(script):
    critic = make_classifier(2).requires_grad_(False)
    trainer = script(value_model=critic)
    before, policy = state(critic), state(trainer.policy_model)
    trainer.train()
    assert not any(weight.requires_grad for weight in critic.parameters())
    assert changed(before, critic) == set()
    assert changed(policy, trainer.policy_model)


def test_a_policy_that_cannot_learn_is_warned_about(script, caplog):
    with caplog.at_level(logging.WARNING, logger="sandan"):
        script(model=make_policy().requires_grad_(False)).train()
    assert "none of its weights is trainable" in caplog.text


def test_a_partly_frozen_critic_trains_its_head(script):
    critic = make_classifier(2)
    critic.model.requires_grad_(False)
    trainer = script(value_model=critic)
    before = state(critic)
    trainer.train()
    assert changed(before, critic) == {"score.weight"}


def test_a_value_head_on_the_backbone_of_a_lora_policy_trains_adapters_and_head(script):
    policy = lora(make_policy(), TaskType.CAUSAL_LM)
    critic = OtherPrefix(policy.get_base_model().model)
    trainer = script(model=policy, ref_model=None, value_model=critic)
    before = state(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert any("score" in name for name in moved)
    assert all("lora" in name or "score" in name for name in moved)


def test_a_critic_may_share_a_backbone_with_the_frozen_reward(script):
    trunk = LlamaModel(LlamaConfig(**SIZES))
    critic, reward = OtherPrefix(trunk), OtherPrefix(trunk)
    trainer = script(value_model=critic, reward_model=reward)
    assert all(weight.requires_grad for weight in critic.parameters())
    assert not any(weight.requires_grad for weight in reward.score.parameters())
    trainer.train()


def test_lora_policy_and_lora_reward(script):
    reward = lora(make_classifier())
    trainer = script(
        model=make_policy(),
        ref_model=None,
        reward_model=reward,
        value_model=None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    assert isinstance(trainer.value_model, type(make_classifier()))
    before = state(reward)
    trainer.train()
    assert changed(before, reward) == set()
    trainer.save_model(trainer.args.output_dir)
    AutoModelForSequenceClassification.from_pretrained(trainer.args.output_dir + "/value_model")


# ---- Padding and precision ----


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "generate"])
def test_an_added_pad_token_is_read_by_no_model(script, engine):
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == SIZES["vocab_size"]
    prompts = Dataset.from_dict({"input_ids": [[64] * (3 - index % 3) + [5] * (1 + index % 3) for index in range(16)]})
    for reward in (make_classifier(), lora(make_classifier()), LogitsReward()):
        trainer = script(
            {"rollout_engine": engine},
            processing_class=tokenizer,
            reward_model=reward,
            train_dataset=prompts,
            eval_dataset=prompts,
        )
        trainer.train()
        trainer.generate_completions()
        trainer.save_model(trainer.args.output_dir)


def test_a_bfloat16_policy_is_warned_about_once_with_the_share_that_moves(script, caplog):
    with caplog.at_level(logging.WARNING, logger="sandan"):
        script({"learning_rate": 3e-6}, model=make_policy().bfloat16(), ref_model=None)
    (line,) = [record.getMessage() for record in caplog.records if "can move" in record.getMessage()]
    assert line.startswith("model: only ")
    assert "torch.float32" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sandan"):
        script({"learning_rate": 3e-6})
        script({"learning_rate": 1e-2}, model=make_policy().bfloat16(), ref_model=None)
    assert "can move" not in caplog.text
