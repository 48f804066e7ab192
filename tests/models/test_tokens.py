"""Over the families of models that people bring: the same rows in every stage, with the right stop token at their end."""

import copy

import pytest
from datasets import Dataset
from helpers import zoo
from trl import RewardConfig, SFTConfig

from sandan.models.rendering import encode_answers, encode_prompts
from sandan.models.tokens import find_stop_tokens, frame, save_stop_tokens
from sandan.reward.rows import encode_side
from sandan.reward.rows import tokenized as reward_rows
from sandan.sft.rows import encode_row
from sandan.sft.rows import tokenized as sft_rows


FAMILIES = pytest.mark.parametrize("name", list(zoo.FAMILIES))
QUESTION, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the pond."}
AGAIN, MORE = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Grass."}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: zoo.make_tokenizer(family) for name, family in zoo.FAMILIES.items()}


@pytest.fixture
def tokenizer(name, tokenizers):
    return copy.deepcopy(tokenizers[name])


def forms(tokenizer):
    """The prompts that a tokenizer can render, as text, as a conversation and as a longer one."""
    chats = [[QUESTION], [QUESTION, ANSWER, AGAIN]] if tokenizer.chat_template else []
    return ["Q: hi\nA:", "Where? ", *chats]


def trained(ids, labels):
    return [token for token, label in zip(ids, labels, strict=True) if label != -100]


@FAMILIES
def test_every_stage_sees_the_same_row(name, tokenizer):
    for prompt in forms(tokenizer):
        chat = isinstance(prompt, list)
        answer = [MORE] if chat else MORE["content"]
        (sent,) = encode_prompts(tokenizer, [prompt])
        ids, labels = encode_row({"prompt": prompt, "completion": answer}, tokenizer)
        # What is sampled after is what was trained after, and the stop token is trained.
        assert ids[: len(sent)] == sent and labels[: len(sent)] == [-100] * len(sent)
        assert labels[len(sent) :] == ids[len(sent) :]
        stop = zoo.FAMILIES[name].stop[0 if chat else 1]
        assert tokenizer.convert_ids_to_tokens(ids[-1]) == stop
        assert ids.count(ids[-1]) == len([token for token in sent if token == ids[-1]]) + 1
        (scored,) = encode_answers(tokenizer, [prompt], [MORE["content"]])
        assert scored == ids
        pair = {"prompt": prompt, "chosen": answer, "rejected": answer}
        assert encode_side(tokenizer, [pair], "chosen") == [ids]
        assert tokenizer.decode(trained(ids, labels)[:-1]).strip() == MORE["content"]


@FAMILIES
def test_a_pair_of_whole_conversations_is_the_pair_with_its_prompt_apart(name, tokenizer):
    if tokenizer.chat_template is None:
        return
    whole = {"chosen": [QUESTION, ANSWER, AGAIN, MORE]}
    apart = {"prompt": [QUESTION, ANSWER, AGAIN], "chosen": [MORE]}
    assert encode_side(tokenizer, [whole], "chosen") == encode_side(tokenizer, [apart], "chosen")


@FAMILIES
def test_the_assistants_turns_are_trained_and_nothing_else(name, tokenizer):
    if tokenizer.chat_template is None:
        return
    turns = [QUESTION, ANSWER, AGAIN, MORE]
    ids, labels = encode_row({"messages": turns}, tokenizer)
    text = tokenizer.decode(trained(ids, labels))
    end = tokenizer.decode(ids[-1])
    # Where the chat format ends a turn without a token, only the last turn has its end, and is trained.
    ended = end in tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.replace("\n", "") == (f"In the pond.{end}" if ended else "") + f"Grass.{end}"
    # A completion may have several turns, too.
    completion = encode_row({"prompt": turns[:1], "completion": turns[1:]}, tokenizer)
    assert completion == (ids, labels)


@FAMILIES
def test_sampling_stops_at_the_trained_token_and_at_the_models_own(name, tokenizer):
    family = zoo.FAMILIES[name]
    model = zoo.make_model(family, tokenizer)
    stops = find_stop_tokens(tokenizer, model.generation_config)
    wanted = {token for token in (*family.stop, *family.stops, family.tokens["eos_token"]) if token}
    assert {tokenizer.convert_ids_to_tokens(token) for token in stops} == wanted
    assert tokenizer.convert_ids_to_tokens(stops[0]) == (family.stop[0] or family.stop[1])
    save_stop_tokens(model, tokenizer, stops)
    saved = model.generation_config.eos_token_id
    assert set([saved] if isinstance(saved, int) else saved) == set(stops)


@FAMILIES
def test_a_text_is_framed_once_and_ends_with_eos(name, tokenizer):
    ids, labels = encode_row({"text": "Grass."}, tokenizer)
    assert (
        ids
        == labels
        == frame(tokenizer) + tokenizer("Grass.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    )
    again, _ = encode_row({"text": f"Grass.{tokenizer.eos_token}"}, tokenizer)
    assert again == ids


@FAMILIES
def test_datasets_become_those_rows(name, tokenizer, tmp_path):
    rows = [{"prompt": "Where? ", "completion": answer} for answer in ("Here.", "There.", "In the pond, far away.")]
    dataset = Dataset.from_list(rows)
    limit = len(encode_row(rows[1], tokenizer)[0])
    config = SFTConfig(str(tmp_path), max_length=limit, use_cpu=True, bf16=False)
    found = sft_rows(dataset, tokenizer, config)
    # A row whose answer would lose its stop token is left out.
    assert found["input_ids"][:] == [encode_row(row, tokenizer)[0] for row in rows[:2]]
    pairs = Dataset.from_list(
        [{"prompt": "Q ", "chosen": "a", "rejected": "b"}, {"prompt": "Q ", "chosen": "b", "rejected": "c"}]
    )
    made = reward_rows(pairs, tokenizer, RewardConfig(str(tmp_path), use_cpu=True, bf16=False))
    assert made["rejected_ids"][0] == made["chosen_ids"][1] == encode_answers(tokenizer, ["Q "], ["b"])[0]


def test_rows_bring_their_tools_to_the_reward_model_as_to_sft(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["qwen instruct"])
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['name'] }} {% endfor %}" + zoo.CHATML
    rows = [
        {"prompt": [QUESTION], "chosen": [MORE], "rejected": [ANSWER], "tools": tools}
        for tools in ([{"name": "search"}], None, '[{"name": "sum"}]')
    ]
    found = encode_side(tokenizer, rows, "chosen")
    assert found == [encode_row({**row, "completion": row["chosen"]}, tokenizer)[0] for row in rows]
    assert [tokenizer.decode(ids).split("<")[0].strip() for ids in found] == ["search", "", "sum"]
