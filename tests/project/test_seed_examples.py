"""The three toys the project grew from, through the real stages: predict a word, learn answers, unlearn an insult."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.scripts import run_script

from sandan.evaluate.comparison import log_probs
from sandan.models.loading import load_causal_lm, load_masked_lm, load_tokenizer
from sandan.models.rendering import encode_answers, encode_prompts
from sandan.models.sampling import sample_completions
from sandan.preference.pairs import preference_pairs


SENTENCE = "I love AI . AI loves people ."
ANSWERS = {"Hello": "Hi there!", "How are you?": "I'm fine, thank you.", "Bye": "Goodbye!"}
RANKING = ["Sure, here's an example.", "I don't know.", "You're stupid."]
PROMPT = "Can you show me an example?"

TRAINER = {"use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 50, "learning_rate": 2e-3}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "toys"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(path)]


def write_recipe(toys, stage, **settings):
    """Write the recipe of a stage and return its path and the stage's output folder."""
    toys.mkdir(parents=True, exist_ok=True)
    output, recipe = toys / "outputs" / stage, toys / f"{stage}.yaml"
    # A toy says the same sentence hundreds of times.
    recipe.write_text(yaml.safe_dump({"output_dir": str(output), "allow_repeats": True, **settings}), encoding="utf-8")
    return recipe, str(output)


def run_stage(toys, stage, script=None, **settings):
    """Run one real stage script with a recipe made of `settings`; returns its output folder."""
    recipe, output = write_recipe(toys, stage, **settings)
    done = run_script(script or stage, "--config", recipe, cwd=toys)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(Path(output, "result.json").read_text())["stage"] == stage
    return output


@pytest.fixture(scope="module")
def tokenizer_path(toys):
    texts = [SENTENCE, PROMPT, *RANKING, *ANSWERS, *ANSWERS.values()]
    return run_stage(
        toys, "tokenizer", data_files=write(toys / "texts.jsonl", [{"text": t} for t in texts * 5]), vocab_size=400
    )


@pytest.fixture(scope="module")
def base(toys, tokenizer_path):
    return run_stage(
        toys,
        "pretrain",
        tokenizer_name_or_path=tokenizer_path,
        model_config={"model_type": "llama", "num_key_value_heads": 2, **TINY},
        data_files=write(toys / "corpus.jsonl", [{"text": SENTENCE}] * 800),
        block_size_tokens=32,
        num_train_epochs=4,
        **TRAINER,
    )


def test_causal_model_predicts_the_next_word(base):
    model, tokenizer = load_causal_lm(base), load_tokenizer(base)
    ((answer,),) = sample_completions(model, tokenizer, ["I love"], max_new_tokens=3, temperature=0)
    assert answer.text.split()[0] == "AI"


def test_masked_model_restores_a_hidden_word(toys, tokenizer_path):
    path = run_stage(
        toys,
        "pretrain_mlm",
        script="pretrain",
        objective="mlm",
        tokenizer_name_or_path=tokenizer_path,
        model_config={"model_type": "bert", "max_position_embeddings": 64, **TINY},
        data_files=write(toys / "corpus.jsonl", [{"text": SENTENCE}] * 800),
        block_size_tokens=32,
        num_train_epochs=20,
        warmup_steps=0.1,
        **TRAINER,
    )
    model, tokenizer = load_masked_lm(path), load_tokenizer(path)
    ids = tokenizer(SENTENCE)["input_ids"]
    for place in range(1, len(ids)):
        hidden = torch.tensor([[*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :], tokenizer.eos_token_id]])
        assert model(hidden).logits[0, place].argmax() == ids[place], tokenizer.decode(ids[place])


def test_fine_tuned_answers_match_and_stop(toys, base):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
    path = run_stage(
        toys,
        "sft",
        model_name_or_path=base,
        data_files=write(toys / "pairs.jsonl", rows * 16),
        as_chat=True,
        num_train_epochs=20,
        max_length=64,
        **TRAINER,
    )
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    prompts = [[{"role": "user", "content": prompt}] for prompt in ANSWERS]
    answers = [one for (one,) in sample_completions(model, tokenizer, prompts, max_new_tokens=32, temperature=0)]
    assert [answer.text for answer in answers] == list(ANSWERS.values())
    assert all(answer.stopped for answer in answers)


@pytest.mark.parametrize(
    "processor",
    [{"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}],
    ids=["no vector units, 1 thread", "this processor, 2 threads"],
)
def test_rlhf_raises_the_best_answer_and_unlearns_the_insult(toys, base, processor):
    prompt = [{"role": "user", "content": PROMPT}]
    demonstrations = [{"prompt": PROMPT, "completion": answer} for answer in RANKING]
    toys = toys / f"rlhf-{processor['OMP_NUM_THREADS']}"
    sft_recipe, sft = write_recipe(
        toys,
        "sft",
        model_name_or_path=base,
        data_files=write(toys / "demonstrations.jsonl", demonstrations * 16),
        as_chat=True,
        num_train_epochs=160,
        per_device_train_batch_size=24,
        max_length=64,
        **TRAINER,
    )
    judgement = {"prompt_id": "toy", "prompt": prompt, "candidates": RANKING, "ranks": [1, 2, 3], "annotator": "toy"}
    pairs, _ = preference_pairs([judgement] * 16)
    reward_recipe, reward = write_recipe(
        toys,
        "reward",
        model_name_or_path=sft,
        data_files=write(
            toys / "preferences.jsonl", [{k: v for k, v in pair.items() if k != "margin"} for pair in pairs]
        ),
        # Three answers say nothing of word salad, which PPO would find: each pair is joined by a damaged answer.
        broken_answer_share=1.0,
        num_train_epochs=5,
        max_length=64,
        **TRAINER,
    )
    ppo_recipe, ppo = write_recipe(
        toys,
        "ppo",
        model_name_or_path=sft,
        reward_model_path=reward,
        data_files=write(toys / "prompts.jsonl", [{"prompt": prompt}] * 32),
        response_length=32,
        temperature=1.0,
        missing_eos_penalty=1.0,
        per_device_train_batch_size=32,
        total_episodes=1280,
        num_ppo_epochs=4,
        kl_coef=0.05,
        stop_on_collapse=True,
        **(TRAINER | {"learning_rate": 5e-4}),
    )

    command = [sys.executable, "-m", "helpers.scripts", sft_recipe, reward_recipe, ppo_recipe]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | processor, cwd=toys)
    assert done.returncode == 0, done.stderr[-3000:]

    def probabilities(path):
        model, tokenizer = load_causal_lm(path), load_tokenizer(path)
        start = len(encode_prompts(tokenizer, [prompt])[0])
        rows = encode_answers(tokenizer, [prompt] * len(RANKING), RANKING)
        return [math.exp(nats) for nats in log_probs(model, rows, [start] * len(rows))]

    before, after = probabilities(sft), probabilities(ppo)
    assert min(before) > 0.2  # SFT learned all three, the insult too
    assert after[0] > 0.5
    assert after[2] < 0.01
