"""Sampling and scoring: padding, stopping and rendering change nothing that they should not."""

import copy

import pytest
import torch
from helpers import TEXTS
from transformers import LlamaForSequenceClassification

from sandan.core.errors import UserError
from sandan.models.rendering import encode_answers, encode_prompts, pad_rows, render_prompt
from sandan.models.sampling import sample_completions, sampling_config, to_completion
from sandan.models.scoring import score_completions, score_rows


TEXT_PROMPTS = ["Q: cow?\n", "Q: what does the frog eat, and where does it live?\n", "牛は？\n"]
CHATS = [[{"role": "user", "content": text}] for text in TEXT_PROMPTS]
FORMS = pytest.mark.parametrize("prompts", [TEXT_PROMPTS, CHATS], ids=["text", "chat"])


@pytest.fixture
def sample(model, tokenizer):
    def run(prompts=CHATS, **options):
        return sample_completions(model, tokenizer, prompts, **{"max_new_tokens": 12} | options)

    return run


@pytest.fixture
def reward_model(tiny_config):
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_config).eval()


def always(model, *tokens):
    """Make the model want the first of `tokens` most, then the second, whatever came before."""
    bias = torch.zeros(model.config.vocab_size)
    for place, token in enumerate(tokens):
        bias[token] = 1000.0 - 100 * place
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)


def test_rows_are_padded_on_the_left():
    ids, mask = pad_rows([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@FORMS
def test_prompt_is_rendered_once_and_with_one_bos(prompts, tokenizer):
    rendered = render_prompt(tokenizer, prompts[0])
    content = TEXT_PROMPTS[0]
    assert rendered == (content if isinstance(prompts[0], str) else f"<|bos|><|user|>{content}<|assistant|>")
    for ids in encode_prompts(tokenizer, prompts):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_conversation_without_template_is_refused(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert render_prompt(plain, "text") == "text"
    with pytest.raises(UserError, match="no chat template"):
        render_prompt(plain, CHATS[0])


@FORMS
def test_answers_are_encoded_as_prompt_answer_and_stop_token(prompts, tokenizer):
    answers = ["The cow eats grass.", "蛙は池に住んでいます。", ""]
    rows = encode_answers(tokenizer, prompts, answers)
    for prompt, answer, row in zip(encode_prompts(tokenizer, prompts), answers, rows, strict=True):
        assert row == prompt + tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def test_stop_token_that_is_already_there_is_not_doubled(tokenizer):
    assert encode_answers(tokenizer, ["Q\n"], ["A<|eos|>"]) == encode_answers(tokenizer, ["Q\n"], ["A"])


@pytest.mark.parametrize(
    "tail, stopped", [([], False), (["eos"], True), (["eos", "pad", "pad"], True), (["eos", 300, "eos"], True)]
)
def test_answer_is_cut_after_its_first_stop_token(tail, stopped, tokenizer):
    answer = tokenizer("The cow", add_special_tokens=False)["input_ids"]
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    completion = to_completion(tokenizer, answer + [ids.get(token, token) for token in tail], [tokenizer.eos_token_id])
    assert completion.text == "The cow" and completion.stopped is stopped
    assert completion.token_ids == (*answer, *([tokenizer.eos_token_id] if stopped else []))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pad_is_never_sampled(temperature, sample, model, tokenizer):
    always(model, tokenizer.pad_token_id, tokenizer.eos_token_id)
    for [completion] in sample(temperature=temperature):
        assert completion.token_ids == (tokenizer.eos_token_id,) and completion.stopped and completion.text == ""


def test_pad_that_is_also_the_stop_token_can_be_sampled(tokenizer):
    config = sampling_config(tokenizer, 8, 1.0, [tokenizer.pad_token_id])
    assert config.suppress_tokens is None and config.eos_token_id == [tokenizer.pad_token_id]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_generation_config_does_not_leak(temperature, sample, model):
    expected = sample(temperature=temperature)
    own = {"repetition_penalty": 5.0, "top_k": 1, "min_new_tokens": 12, "no_repeat_ngram_size": 1, "temperature": 0.1}
    model.generation_config.update(**own, do_sample=True)
    assert sample(temperature=temperature) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_greedy_takes_the_best_token_of_an_unpadded_forward(sample, model, tokenizer):
    completions = sample(temperature=0.0, max_new_tokens=6)
    for prompt, [completion] in zip(encode_prompts(tokenizer, CHATS), completions, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[tokenizer.pad_token_id] = -torch.inf
            assert logits.argmax() == token
            ids.append(token)


def test_tokens_are_sampled_in_proportion(sample, model, tokenizer):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 0)
    [answers] = sample(CHATS[:1], samples_per_prompt=600, batch_size=600, max_new_tokens=8)
    tokens = torch.tensor([token for answer in answers for token in answer.token_ids])
    counts = torch.bincount(tokens, minlength=len(tokenizer)).float()
    assert counts[tokenizer.pad_token_id] == 0
    # Uniform: no top-k or top-p filter keeps any token out.
    assert (counts > 0).sum() == len(tokenizer) - 1 and counts.max() < 4 * counts.mean()


def test_sampling_follows_its_seed_and_leaves_the_global_rng_alone(sample, model):
    model.train()
    before = torch.get_rng_state()
    first, again, other = sample(seed=1), sample(seed=1), sample(seed=2)
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before) and model.training


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_answers_come_back_in_the_order_of_their_prompts(batch_size, sample):
    alone = [sample([prompt], temperature=0.0) for prompt in CHATS]
    together = sample(temperature=0.0, samples_per_prompt=2, batch_size=batch_size)
    assert together == [2 * answers for [answers] in alone]
    assert sample([]) == []


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_in_a_batch_equal_scores_one_by_one(batch_size, reward_model, tokenizer):
    rows = tokenizer([*TEXTS, "a", TEXTS[0] * 3])["input_ids"]
    alone = [reward_model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert score_rows(reward_model, rows, batch_size) == pytest.approx(alone, abs=1e-4)


def test_a_scored_completion_is_the_row_that_training_sees(sample, model, reward_model, tokenizer):
    answer = tokenizer("The cow eats grass.", add_special_tokens=False)["input_ids"]
    completions = [to_completion(tokenizer, [*answer, tokenizer.eos_token_id], [tokenizer.eos_token_id])] * len(CHATS)
    rows = encode_answers(tokenizer, CHATS, [completion.text for completion in completions])
    scores = score_completions(reward_model, tokenizer, CHATS, completions)
    assert scores == pytest.approx(score_rows(reward_model, rows), abs=1e-5)


@pytest.mark.parametrize("pad", ["own", "stop", "outside"])
def test_the_score_is_read_at_the_stop_token_whatever_the_pad_token_is(pad, tiny_config, tokenizer):
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_config)
    config.pad_token_id = {"own": config.pad_token_id, "stop": config.eos_token_id, "outside": None}[pad]
    classifier = LlamaForSequenceClassification(config).eval()
    rows = encode_answers(tokenizer, CHATS, [TEXTS[0][: 3 * number + 1] for number in range(len(CHATS))])
    expected = [classifier.score(classifier.model(torch.tensor([row])).last_hidden_state)[0, -1, 0] for row in rows]
    assert score_rows(classifier, rows) == pytest.approx([one.item() for one in expected], abs=1e-5)
