"""The old `PPOTrainer`: `step` against a slow reference, `generate`, and the loops that people write."""

import copy
import math

import pytest
import torch
from accelerate.tracking import GeneralTracker
from datasets import Dataset
from helpers.tiny_ppo import make_policy, make_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, HfArgumentParser

from sandan.legacy import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
)

from .test_value_head import t5


SMALL = {"batch_size": 6, "mini_batch_size": 6, "ppo_epochs": 2, "accelerator_kwargs": {"cpu": True}, "seed": 1}


def make_model(**kwargs):
    torch.manual_seed(3)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_policy(), **kwargs)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.2)
    return model


def moved(model, size=0.02):
    """A copy of a model with other weights, so that there is a KL."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return other


def make_trainer(model=None, ref_model=None, sgd=True, tokenizer=None, trainer=None, **kwargs):
    model = make_model() if model is None else model
    if sgd:
        # Its step is the gradient times a number, so weights show gradients.
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trainer = {"optimizer": torch.optim.SGD(parameters, lr=0.05)} | (trainer or {})
    return PPOTrainer(PPOConfig(**SMALL | kwargs), model, ref_model, tokenizer or make_tokenizer(), **trainer or {})


def make_rows(rows=6, seed=0, first=3):
    generator = torch.Generator().manual_seed(seed)
    queries = [torch.randint(first, 64, (3 + row % 3,), generator=generator) for row in range(rows)]
    responses = [torch.randint(first, 64, (3 + row * 5 % 7,), generator=generator) for row in range(rows)]
    scores = [torch.randn((), generator=generator) * 2 for _ in range(rows)]
    return queries, responses, scores


# ---- The slow reference: one row at a time, one token at a time, as in the papers ----


def outputs_of(model, query, response):
    """Log-probs, distributions (logits) and values of a response's tokens, of a row alone."""
    logits, _, values = model(torch.cat([query, response])[None])
    start = len(query) - 1
    logits, values = logits[0, start:-1], values[0, start:-1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response], logits, values


def penalty(kind, logprob, ref_logprob, logits, ref_logits):
    if kind == "full":
        p, q = logits.softmax(-1), ref_logits.softmax(-1)
        return sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p)))
    gap = logprob - ref_logprob
    return {"kl": gap, "abs": gap.abs(), "mse": gap**2 / 2}[kind]


def slow_advantages(rewards, values, gamma, lam):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def slow_step(model, reference, queries, responses, scores, masks, config, kl_coef):
    """One optimizer step a pass on all rows, with SGD at 0.05. Return what `step` reports."""
    rows = list(zip(queries, responses, strict=True))
    kept = [
        torch.ones(len(one)).bool() if masks is None else mask.bool()
        for one, mask in zip(responses, masks or responses, strict=True)
    ]
    with torch.no_grad():
        old = [outputs_of(model, *row) for row in rows]
        ref = [outputs_of(reference, *row) for row in rows]
    kls, rewards, values = [], [], []
    for row, (logprobs, logits, value) in enumerate(old):
        at = kept[row].nonzero().flatten().tolist()
        kl = [penalty(config.kl_penalty, logprobs[t], ref[row][0][t], logits[t], ref[row][1][t]) for t in at]
        reward = [-kl_coef * one for one in kl]
        reward[-1] = reward[-1] + scores[row]
        kls.append(kl)
        rewards.append(reward)
        values.append([value[t] for t in at])
    if config.whiten_rewards:
        every = torch.stack([one for row in rewards for one in row])
        rewards = [
            [(one - every.mean()) / (every.var() + 1e-8).sqrt() + every.mean() for one in row] for row in rewards
        ]
    gae = [slow_advantages(r, v, config.gamma, config.lam) for r, v in zip(rewards, values, strict=True)]
    raw = torch.stack([one for row in gae for one in row])
    old_values = torch.stack([one for row in values for one in row])
    old_logprobs = torch.cat([old[row][0][kept[row]] for row in range(len(rows))])
    returns, advantages = raw + old_values, (raw - raw.mean()) / (raw.var() + 1e-8).sqrt()
    reports = []
    for _ in range(config.ppo_epochs):
        new = [outputs_of(model, *row) for row in rows]
        logprobs = torch.cat([new[row][0][kept[row]] for row in range(len(rows))])
        now = torch.cat([new[row][2][kept[row]] for row in range(len(rows))])
        ratio = (logprobs - old_logprobs).exp()
        policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - config.cliprange, 1 + config.cliprange))
        near = torch.min(torch.max(now, old_values - config.cliprange_value), old_values + config.cliprange_value)
        value = torch.max((now - returns) ** 2, (near - returns) ** 2) / 2
        loss = policy.mean() + config.vf_coef * value.mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        reports.append((policy.mean().item(), value.mean().item(), loss.item(), (ratio.log() ** 2).mean().item() / 2))
    policy, value, total, approxkl = torch.tensor(reports).mean(0).tolist()
    return {
        "objective/kl": sum(float(sum(row)) for row in kls) / len(rows),
        "objective/entropy": -old_logprobs.sum().item() / len(rows),
        "ppo/mean_non_score_reward": -kl_coef * torch.stack([one for row in kls for one in row]).mean().item(),
        "ppo/loss/policy": policy,
        "ppo/loss/value": value,
        "ppo/loss/total": total,
        "ppo/policy/approxkl": approxkl,
        "ppo/returns/mean": returns.mean().item(),
        "ppo/returns/var": returns.var().item(),
        "ppo/val/mean": old_values.mean().item(),
        "ppo/policy/advantages": advantages,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_penalty": "mse", "gamma": 0.97, "vf_coef": 0.5},
        {"kl_penalty": "abs", "lam": 1.0, "cliprange": 0.01, "cliprange_value": 0.05},
        {"kl_penalty": "full", "whiten_rewards": True},
        {"masked": True},
        {"mini_batch_size": 2, "gradient_accumulation_steps": 3},
        {"tokenizer": make_tokenizer(side="left")},
        {"tokenizer": make_tokenizer(pad="</s>")},
    ],
    ids=lambda settings: ", ".join(settings) or "defaults",
)
def test_a_step_equals_the_slow_reference(settings):
    masked = settings.pop("masked", False) if "masked" in (settings := dict(settings)) else False
    model = make_model()
    slow, reference = copy.deepcopy(model).eval(), moved(model).eval()
    trainer = make_trainer(model, copy.deepcopy(reference), **settings)
    for number in range(2):
        queries, responses, scores = make_rows(seed=number, first=0)
        masks = [torch.tensor([1, 0, *[1] * (len(one) - 2)]) for one in responses] if masked else None
        kl_coef = trainer.kl_ctl.value
        stats = trainer.step(queries, responses, scores, response_masks=masks)
        expected = slow_step(slow, reference, queries, responses, scores, masks, trainer.config, kl_coef)
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.as_tensor(stats[name], dtype=torch.float64),
                torch.as_tensor(value, dtype=torch.float64),
                atol=1e-5,
                rtol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for (name, one), other in zip(model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_an_optimizer_step_does_not_depend_on_how_it_is_cut():
    weights = []
    for size, accumulated in ((6, 1), (2, 3), (1, 6)):
        model = make_model()
        trainer = make_trainer(model, moved(model), mini_batch_size=size, gradient_accumulation_steps=accumulated)
        stats = trainer.step(*make_rows())
        weights.append(torch.cat([one.flatten() for one in model.parameters()]))
        assert stats["ppo/policy/ratio"].shape == (2 * sum(len(row) for row in make_rows()[1]),)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights[0], weights[2], atol=1e-5, rtol=1e-4)


def test_statistics_have_the_names_of_trl():
    stats = make_trainer().step(*make_rows())
    assert {
        *("objective/kl", "objective/kl_dist", "objective/kl_coef", "objective/entropy", "objective/logprobs"),
        *("objective/ref_logprobs", "ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores"),
        *("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/entropy", "ppo/policy/approxkl"),
        *("ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/policy/advantages", "ppo/policy/advantages_mean"),
        *("ppo/policy/ratio", "ppo/returns/mean", "ppo/returns/var", "ppo/val/vpred", "ppo/val/error"),
        *("ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var", "ppo/val/var_explained", "ppo/learning_rate"),
        *("tokens/queries_len_mean", "tokens/responses_len_std", "tokens/responses_dist", "time/ppo/total"),
        *(
            "time/ppo/forward_pass",
            "time/ppo/compute_rewards",
            "time/ppo/compute_advantages",
            "time/ppo/optimize_step",
            "time/ppo/calc_stats",
        ),
    } <= set(stats)
    assert stats["objective/kl"] == 0
    assert stats["objective/kl_dist"].shape == (6,)
    assert all(isinstance(value, float) for name, value in stats.items() if "dist" not in name and "/time" in name)


def test_the_kl_coefficient_follows_its_target():
    model = make_model()
    for adaptive in (True, False):
        trainer = make_trainer(copy.deepcopy(model), moved(model), adap_kl_ctrl=adaptive)
        stats = trainer.step(*make_rows())
        error = min(max(stats["objective/kl"] / 6 - 1, -0.2), 0.2)
        assert trainer.kl_ctl.value == pytest.approx(0.2 * (1 + error * 6 / 10_000) if adaptive else 0.2)
        assert stats["objective/kl_coef"] == 0.2


def test_scores_are_scaled_by_all_so_far_and_clipped():
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True)
    seen = []
    for number in range(3):
        queries, responses, scores = make_rows(seed=number)
        seen += [float(score) for score in scores]
        stats = trainer.step(queries, responses, scores)
        everything, last = torch.tensor(seen), torch.tensor(seen[-6:])
        assert stats["ppo/mean_scores"] == pytest.approx(
            ((last - everything.mean()) / everything.std()).mean().item(), abs=1e-5
        )
    stats = make_trainer(score_clip=0.5).step(*make_rows())
    expected = torch.stack(make_rows()[2]).clamp(-0.5, 0.5)
    assert stats["ppo/mean_scores"] == pytest.approx(expected.mean().item())
    assert stats["ppo/std_scores"] == pytest.approx(expected.std().item())


def test_every_step_is_clipped():
    model = make_model()
    trainer = make_trainer(model, max_grad_norm=1e-3)
    for number in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        trainer.step(*make_rows(seed=number))
        moves = [one - other for one, other in zip(model.parameters(), before, strict=True)]
        # Two optimizer steps, each of at most the learning rate times the norm.
        assert torch.cat([move.flatten() for move in moves]).norm() <= 2 * 0.05 * 1e-3 * 1.01


def test_a_mini_batch_with_a_large_ratio_moves_nothing(caplog):
    model = make_model()
    trainer = make_trainer(model, sgd=False, ratio_threshold=0.5)
    before = copy.deepcopy(model.state_dict())
    trainer.step(*make_rows())
    assert "above ratio_threshold" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_early_stopping_ends_the_passes():
    model = make_model()
    tokens = sum(len(row) for row in make_rows()[1])
    made = []
    for target in (1e-9, 1e9):
        trainer = make_trainer(
            copy.deepcopy(model), ppo_epochs=5, early_stopping=True, target_kl=target, learning_rate=1e-2, sgd=False
        )
        made.append(len(trainer.step(*make_rows())["ppo/policy/ratio"]) / tokens)
    assert made[0] < made[1] == 5


def test_runs_are_reproducible():
    runs = []
    for _ in range(2):
        trainer = make_trainer(mini_batch_size=2, sgd=False)
        runs.append([trainer.step(*make_rows(seed=number))["ppo/loss/total"] for number in range(2)])
    assert runs[0] == runs[1]


def test_dropout_is_off_in_sampling_and_training():
    policy = make_policy(attention_dropout=0.5)
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(policy)
    trainer = make_trainer(model, ppo_epochs=1)
    assert trainer.step(*make_rows())["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-12)
    assert model.training


def test_gradient_checkpointing_is_used_and_changes_nothing():
    weights = []
    for on in (False, True):
        model = make_model()
        trainer = make_trainer(model, moved(model), gradient_checkpointing=on)
        trainer.step(*make_rows())
        weights.append(torch.cat([one.flatten() for one in model.parameters()]))
        assert model.pretrained_model.is_gradient_checkpointing == on
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_the_schedule_moves_once_a_step():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 / (1 + step))
    trainer = make_trainer(model, trainer={"optimizer": optimizer, "lr_scheduler": schedule})
    assert [trainer.step(*make_rows())["ppo/learning_rate"] for _ in range(2)] == pytest.approx([1e-4, 5e-5])


def test_a_reference_that_is_given_is_used_with_peft_too():
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = make_model(peft_config=lora)
    assert make_trainer(model).step(*make_rows())["objective/kl"] == 0
    other = create_reference_model(moved(make_model(), 0.1))
    assert make_trainer(make_model(peft_config=lora), other).step(*make_rows())["objective/kl"] != 0


# ---- Refused in one line ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (q[:5], r, s), r"queries: step takes config.batch_size = 6 rows, found 5"),
        (lambda q, r, s: (q, r, s[:4]), r"scores: step takes config.batch_size = 6 rows, found 4"),
        (lambda q, r, s: (q, [one[None] for one in r], s), r"responses: row 0 must be .* one dimension, found shape"),
        (lambda q, r, s: (["a"] * 6, r, s), r"queries: row 0 must be a tensor of token ids .* found str"),
        (lambda q, r, s: (q, [*r[:5], r[0][:0]], s), r"responses: row 5 has no tokens"),
        (
            lambda q, r, s: (q, r, [*s[:2], math.nan, *s[3:]]),
            r"scores: row 2 must be one finite number, found \[nan\]",
        ),
        (
            lambda q, r, s: (q, r, [torch.zeros(2), *s[1:]]),
            r"scores: row 0 must be one finite number, found \[0.0, 0.0\]",
        ),
        (lambda q, r, s: ([torch.tensor([64]), *q[1:]], r, s), r"queries: row 0 has the id 64, .* ids are 0 to 63"),
        (lambda q, r, s: (q, [torch.tensor([-1, 3]), *r[1:]], s), r"responses: row 0 has the id -1"),
    ],
)
def test_rows_that_cannot_be_trained_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer().step(*change(*make_rows()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_score_norm": True}, "use_score_norm: has no effect without use_score_scaling"),
        ({"adap_kl_ctrl": False, "target": 3.0}, "target, horizon: have no effect with adap_kl_ctrl=False"),
        ({"dataset_num_proc": 2}, "dataset_num_proc: has no effect"),
        ({"push_to_hub_if_best_kwargs": {"repo_id": "a"}}, "push_to_hub_if_best_kwargs.*not in sandan.legacy"),
        ({"batch_size": 6, "mini_batch_size": 4}, r"batch_size: 6 is no multiple of .* 4 \* 1"),
        ({"kl_penalty": "k3"}, "kl_penalty: expected 'kl'"),
        ({"ppo_epochs": 0}, "ppo_epochs: must be greater than 0, found 0"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_arguments_without_effect_are_refused():
    model = make_model()
    with pytest.raises(TypeError, match=r"model: expected a model with a value head, found LlamaForCausalLM; wrap it"):
        make_trainer(make_policy())
    with pytest.raises(TypeError, match="ref_model: expected a model with a value head"):
        make_trainer(model, make_policy())
    with pytest.raises(ValueError, match="ref_model: is the model itself"):
        make_trainer(model, model)
    with pytest.raises(ValueError, match="num_shared_layers: has no effect with ref_model"):
        make_trainer(model, moved(model), trainer={"num_shared_layers": 1})
    with pytest.raises(ValueError, match="log_with: 'clearml' is not installed"):
        make_trainer(model, log_with="clearml")
    with pytest.raises(ValueError, match="dataset: has 4 rows, less than one batch of 6"):
        make_trainer(model, trainer={"dataset": Dataset.from_dict({"query": ["w1"] * 4})})


def test_old_scripts_settings_are_read():
    config = PPOConfig(forward_batch_size=16, batch_size=64, steps=200, optimize_cuda_cache=True, target_kl=0.1)
    assert (config.mini_batch_size, config.total_ppo_epochs, config.optimize_device_cache) == (16, 4, True)
    assert config.to_dict()["learning_rate"] == 1.41e-5
    (parsed,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--batch_size", "4", "--mini_batch_size", "2"]
    )
    assert parsed.backward_batch_size == 2


def test_responses_that_repeat_their_queries_are_noticed(caplog):
    queries, responses, scores = make_rows()
    trainer = make_trainer()
    trainer.step(queries, responses, scores)
    assert "begins with its query" not in caplog.text
    trainer.step(queries, [torch.cat(pair) for pair in zip(queries, responses, strict=True)], scores)
    assert "responses: each begins with its query" in caplog.text


# ---- Sampling ----


# As in the sentiment tutorial.
GENERATION = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1, "eos_token_id": -1}


def test_a_list_of_queries_gets_a_list_of_answers(caplog):
    trainer = make_trainer()
    queries, _, _ = make_rows()
    answers = trainer.generate(queries, return_prompt=False, length_sampler=LengthSampler(4, 9), **GENERATION)
    assert len(answers) == 6
    assert all(1 <= len(answer) < 9 for answer in answers)
    whole = trainer.generate(queries, max_new_tokens=4, **GENERATION)
    assert all(torch.equal(one[: len(query)], query) for one, query in zip(whole, queries, strict=True))
    single = trainer.generate(queries[0], max_new_tokens=4, **GENERATION)
    assert single.shape == (1, len(queries[0]) + 4)
    assert "should consist of positive integers" not in caplog.text


def test_greedy_answers_do_not_depend_on_the_batch_and_equal_the_reference_at_first():
    trainer = make_trainer()
    queries, _, _ = make_rows()
    together, reference = trainer.generate(
        queries, batch_size=6, max_new_tokens=5, do_sample=False, pad_token_id=0, generate_ref_response=True
    )
    alone = trainer.generate(queries, batch_size=1, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for one, other, ref in zip(together, alone, reference, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, ref)


def test_an_eos_in_the_query_does_not_end_the_answer(monkeypatch):
    trainer = make_trainer()
    query = torch.tensor([1, 5, 6])
    monkeypatch.setattr(
        trainer.model.pretrained_model,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[7, 8, 1, 0]])], 1),
    )
    assert trainer.generate([query])[0].tolist() == [1, 5, 6, 7, 8, 1]
    assert trainer.generate([query], remove_padding=False)[0].tolist() == [1, 5, 6, 7, 8, 1, 0]
    with pytest.raises(ValueError, match="query_tensor: expected a tensor of one dimension"):
        trainer.generate(query[None])


def test_respond_to_batch_gives_new_tokens_only():
    assert respond_to_batch(make_model(), torch.tensor([[3, 4], [5, 6]]), txt_len=7).shape == (2, 7)


# ---- As people write it ----


class Tracker(GeneralTracker):
    """Keeps what it is given."""

    name, requires_logging_directory, tracker = "memory", False, None

    def __init__(self):
        super().__init__()
        self.settings, self.logs = {}, []

    def store_init_configuration(self, values):
        self.settings |= values

    def log(self, values, step, **kwargs):
        self.logs.append(values)

    def __deepcopy__(self, memo):
        return self


def build_dataset(rows=64):
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict({"review": [f"w{row % 61} w{row * 7 % 61} w{row * 3 % 61}" for row in range(rows)]})

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    dataset = dataset.map(tokenize, batched=False)
    dataset.set_format(type="torch")
    return dataset


def collator(data):
    return {key: [row[key] for row in data] for key in data[0]}


def sentiment(texts):
    """Likes w5, w7 and w9."""
    return [{"score": sum(word in ("w5", "w7", "w9") for word in text.split()) / 3} for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_sentiment_tutorial_learns(tmp_path, peft):
    config = PPOConfig(
        model_name="toy", learning_rate=2e-2 if peft else 3e-3, batch_size=32, mini_batch_size=16, log_with=(tracker := Tracker()),
        accelerator_kwargs={"cpu": True}, init_kl_coef=0.02,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    # A head large enough for adapters below it to change what is sampled.
    make_policy(initializer_range=0.2).save_pretrained(tmp_path / "toy")
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "toy", peft_config=lora)
    ref_model = None if peft else AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "toy")
    trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=build_dataset(), data_collator=collator)
    assert trainer.current_device == trainer.accelerator.device
    means = []
    for _ in range(10):
        for batch in trainer.dataloader:
            query_tensors = batch["input_ids"]
            response_tensors = []
            for query in query_tensors if not means else ():
                response = trainer.generate(query, **GENERATION | {"max_new_tokens": 6})
                response_tensors.append(response.squeeze()[-6:])
            if not response_tensors:
                response_tensors = trainer.generate(
                    query_tensors, return_prompt=False, batch_size=32, max_new_tokens=6, **GENERATION
                )
            batch["response"] = [tokenizer.decode(response.squeeze()) for response in response_tensors]
            rewards = [torch.tensor(output["score"]) for output in sentiment(batch["response"])]
            stats = trainer.step(query_tensors, response_tensors, rewards)
            trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response"])
            means.append(stats["ppo/mean_scores"])
    assert sum(means[-4:]) / 4 > sum(means[:4]) / 4 + 0.3
    assert tracker.settings["model_name"] == "toy"
    assert [logs["ppo/mean_scores"] for logs in tracker.logs] == means
    assert tracker.logs[0]["env/reward_mean"] == pytest.approx(means[0])
    trainer.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "by_model")
    for folder in ("out", "by_model"):
        again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / folder).eval()
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(again(ids)[2], trainer.model.eval()(ids)[2])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(plain(ids).logits, again(ids)[0])
    assert {"README.md", "tokenizer_config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_the_quickstart_runs():
    model = make_model()
    model_ref = create_reference_model(model)
    tokenizer = make_tokenizer()
    trainer = PPOTrainer(
        PPOConfig(mini_batch_size=1, batch_size=1, optimize_cuda_cache=True, accelerator_kwargs={"cpu": True}),
        model,
        model_ref,
        tokenizer,
    )
    query_tensor = tokenizer.encode("w3 w4 w5", return_tensors="pt")
    response_tensor = trainer.generate(
        list(query_tensor), return_prompt=False, do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=1
    )
    stats = trainer.step([query_tensor[0]], [response_tensor[0]], [torch.tensor(1.0)])
    assert stats["ppo/mean_scores"] == 1
    assert stats["ppo/std_scores"] == 0
    trainer.log_stats(stats, {"query": ["a"], "response": ["b"]}, [torch.tensor(1.0)])


def test_an_encoder_decoder_learns_from_its_answers():
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t5())
    trainer = make_trainer(model, sgd=False, learning_rate=1e-2)
    queries, _, scores = make_rows()
    answers = trainer.generate(queries, max_new_tokens=5, do_sample=True, top_k=0)
    assert all(answer[0] == 0 and len(answer) > 1 for answer in answers)
    stats = trainer.step(queries, answers, scores)
    assert len(stats["ppo/policy/ratio"]) == 2 * sum(len(answer) - 1 for answer in answers)
    assert stats["objective/kl"] == 0
    alone = model.eval()(queries[0][None], decoder_input_ids=answers[0][None])[0][0, :-1].log_softmax(-1)
    later = trainer.step(queries, answers, scores)["objective/logprobs"][0][: len(answers[0]) - 1]
    expected = alone[torch.arange(len(answers[0]) - 1), answers[0][1:]].detach()
    torch.testing.assert_close(torch.tensor(later), expected, atol=1e-5, rtol=1e-4)
