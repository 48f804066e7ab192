"""Every family of models that people bring, through every stage with the real scripts: it ends well, or in one line.

"Well" is: the stop token was trained, is sampled with and saved, so that the folder stops with plain transformers too.
"""

import json

import pytest
from helpers import zoo
from helpers.scripts import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sandan.models.loading import load_causal_lm, load_tokenizer
from sandan.models.sampling import sample_completions


pytestmark = pytest.mark.slow

FAST = [
    "--use_cpu",
    "true",
    "--bf16",
    "false",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "5",
]
ANSWERS = ("Grass.", "In the pond.", "A small old house.")
QUESTIONS = [f"What is {name}?" for name in ("it", "a cow", "the rain", "red", "old", "a frog", "the sea")]
ROWS = [(question, ANSWERS[index % 3]) for index, question in enumerate(QUESTIONS)]


def turns(question, answer=None):
    user = [{"role": "user", "content": question}]
    return user if answer is None else [*user, {"role": "assistant", "content": answer}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of each kind that the stages take, as text and as turns."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {
        "pairs": [{"prompt": f"{question} ", "completion": answer} for question, answer in ROWS],
        "messages": [{"messages": turns(*row)} for row in ROWS],
        "text": [{"text": f"{question} {answer}"} for question, answer in ROWS],
        "prompts": [{"prompt": f"{question} "} for question, _ in ROWS],
        "chats": [{"prompt": turns(question)} for question, _ in ROWS],
        "preferences": [{"prompt": f"{question} ", "chosen": answer, "rejected": "No."} for question, answer in ROWS],
        "chosen": [{"chosen": turns(*row), "rejected": turns(row[0], "No.")} for row in ROWS],
    }
    return {name: write(folder / f"{name}.jsonl", rows) for name, rows in kinds.items()}


class Chain:
    """The stages of one family, in a folder of their own."""

    def __init__(self, folder, name, data):
        self.family, self.folder, self.data = zoo.FAMILIES[name], folder, data
        self.model = zoo.write(name, folder / "model")
        self.chat = self.family.chat_template is not None

    def run(self, stage, output, *options, fails=False):
        done = run_script(stage, "--output_dir", self.folder / output, *options, cwd=self.folder)
        if not fails:
            assert done.returncode == 0, done.stderr[-2000:]
            return self.folder / output
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert not (self.folder / output).exists() or not list((self.folder / output).rglob("*.safetensors"))
        return done.stderr.strip().splitlines()[-1]

    def sft(self, output, kind, *options, **how):
        files = ("--data_files", self.data[kind], "--allow_repeats", "true")
        return self.run("sft", output, "--model_name_or_path", self.model, *files, *FAST, *options, **how)


@pytest.fixture(scope="module", params=list(zoo.FAMILIES))
def chain(request, tmp_path_factory, data):
    return Chain(tmp_path_factory.mktemp("zoo"), request.param, data)


@pytest.fixture(scope="module")
def tuned(chain):
    """The family after SFT on its own form of the rows, until it knows them by heart."""
    kind = "messages" if chain.chat else "pairs"
    learning = "--learning_rate 5e-3 --num_train_epochs 150 --per_device_train_batch_size 7 --warmup_steps 10"
    return chain.sft("sft", kind, *learning.split())


def test_answers_stop_where_the_chat_format_ends_a_turn(chain, tuned):
    prompts = [turns(question) if chain.chat else f"{question} " for question in QUESTIONS]
    model, tokenizer = load_causal_lm(str(tuned)), load_tokenizer(str(tuned))
    answers = [answer for (answer,) in sample_completions(model, tokenizer, prompts, 32, temperature=0)]
    stop = tokenizer.convert_tokens_to_ids(chain.family.stop[0 if chain.chat else 1])
    assert [answer.token_ids[-1] for answer in answers] == [stop] * len(answers)
    assert [answer.text.strip() for answer in answers] == [answer for _, answer in ROWS]


def test_the_saved_folder_stops_with_plain_transformers(chain, tuned):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tuned), AutoTokenizer.from_pretrained(tuned)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = turns(QUESTIONS[0]) if chain.chat else f"{QUESTIONS[0]} "
    (found,) = generate(prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
    text = found["generated_text"][-1]["content"] if chain.chat else found["generated_text"].removeprefix(prompt)
    assert text.strip() == ROWS[0][1]


def test_pretraining_goes_on_from_it(chain):
    output = chain.run(
        "pretrain",
        "pretrain",
        *("--model_name_or_path", chain.model, "--tokenizer_name_or_path", chain.model, "--max_steps", 2),
        *("--data_files", chain.data["text"], "--block_size_tokens", 16, *FAST),
    )
    before, after = (AutoModelForCausalLM.from_pretrained(path).generation_config for path in (chain.model, output))
    own = before.eos_token_id if isinstance(before.eos_token_id, list) else [before.eos_token_id]
    assert {*own} <= {*(after.eos_token_id if isinstance(after.eos_token_id, list) else [after.eos_token_id])}


def test_other_forms_of_rows_are_trained_or_refused_with_the_option_that_helps(chain):
    for kind in ("pairs", "text"):
        chain.sft(f"sft-{kind}", kind, "--max_steps", 1)
    if not chain.chat:
        line = chain.sft("sft-messages", "messages", "--max_steps", 1, fails=True)
        assert "no chat template" in line and "--chat_template_path" in line


def test_rlhf_and_evaluation_run(chain, tuned):
    prompts, pairs = ("chats", "chosen") if chain.chat else ("prompts", "preferences")
    chain.run(
        "candidates",
        "candidates",
        *("--model_name_or_path", tuned, "--data_files", chain.data[prompts], "--max_new_tokens", 32),
    )
    reward = chain.run(
        "reward",
        "reward",
        *("--model_name_or_path", tuned, "--data_files", chain.data[pairs], "--allow_repeats", "true"),
        *("--max_steps", 2, *FAST),
    )
    ppo = chain.run(
        "ppo",
        "ppo",
        *("--model_name_or_path", tuned, "--reward_model_path", reward, "--data_files", chain.data[prompts]),
        *("--total_episodes", 8, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1),
        *("--response_length", 32, *FAST),
    )
    evaluated = chain.run(
        "evaluate",
        "evaluate",
        *("--base_model", chain.model, "--sft_model", tuned, "--ppo_model", ppo, "--reward_model", reward),
        *("--data_files", chain.data[prompts], "--text_file", chain.data["text"], "--max_new_tokens", 32),
    )
    rows = json.loads((evaluated / "comparison.json").read_text())
    assert next(row for row in rows if row["model"] == "sft")["stopped_share"] > 0.5
