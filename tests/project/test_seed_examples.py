"""The three toys the project grew from, as the commands of recipe `toys`: predict a word, learn answers, unlearn an insult."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import OFFLINE, ROOT

from sandan.evaluate.comparison import log_probs
from sandan.models.loading import load_causal_lm, load_masked_lm, load_tokenizer
from sandan.models.rendering import encode_answers, encode_prompts
from sandan.models.sampling import sample_completions


pytestmark = pytest.mark.slow
PROCESSORS = {
    "no vector units, 1 thread": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "this processor, 2 threads": {"OMP_NUM_THREADS": "2"},
}


def rows(name):
    """The rows of a file of the toys' data."""
    return [json.loads(line) for line in (ROOT / "data" / "toys" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=PROCESSORS)
def toys(request, tmp_path_factory):
    """The output folder of `sandan chain --recipe toys`, run in an empty folder."""
    folder = tmp_path_factory.mktemp("toys")
    done = subprocess.run(
        [sys.executable, "-m", "sandan.command", "chain", "--recipe", "toys"],
        check=False,
        cwd=folder,
        env=os.environ | OFFLINE | PROCESSORS[request.param],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "outputs" / "toys"


def loaded(path, load=load_causal_lm):
    return load(str(path)), load_tokenizer(str(path))


def test_causal_model_predicts_the_next_word(toys):
    ((answer,),) = sample_completions(*loaded(toys / "pretrain"), ["I love"], max_new_tokens=3, temperature=0)
    assert answer.text.split()[0] == "AI"


def test_masked_model_restores_a_hidden_word(toys):
    model, tokenizer = loaded(toys / "pretrain_mlm", load_masked_lm)
    ids = tokenizer(rows("pretrain.jsonl")[0]["text"])["input_ids"]
    for place in range(1, len(ids)):
        hidden = torch.tensor([[*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :], tokenizer.eos_token_id]])
        assert model(hidden).logits[0, place].argmax() == ids[place], tokenizer.decode(ids[place])


def test_fine_tuned_answers_match_and_stop(toys):
    expected = {row["prompt"]: row["completion"] for row in rows("sft.jsonl")[:3]}
    prompts = [[{"role": "user", "content": prompt}] for prompt in expected]
    sampled = sample_completions(*loaded(toys / "sft"), prompts, max_new_tokens=32, temperature=0)
    answers = [answer for (answer,) in sampled]
    assert [answer.text for answer in answers] == list(expected.values())
    assert all(answer.stopped for answer in answers)


def test_rlhf_raises_the_best_answer_and_unlearns_the_insult(toys):
    judgement = rows("judgements.jsonl")[0]
    prompt, answers = judgement["prompt"], judgement["candidates"]

    def probabilities(path: Path):
        model, tokenizer = loaded(path)
        start = len(encode_prompts(tokenizer, [prompt])[0])
        ids = encode_answers(tokenizer, [prompt] * len(answers), answers)
        return [math.exp(nats) for nats in log_probs(model, ids, [start] * len(ids))]

    assert judgement["ranks"] == [1, 2, 3]
    before, after = probabilities(toys / "sft"), probabilities(toys / "ppo")
    assert min(before) > 0.2  # SFT learned all three, the insult too
    assert after[0] > 0.5
    assert after[2] < 0.01
