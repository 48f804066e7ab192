"""Bad inputs of every kind, and the line that each gets: docs/bad_inputs.md is this table, written and tested.

    PYTHONPATH=tests python tests/helpers/bad_inputs.py > docs/bad_inputs.md

Every case runs a real script in this process, in a folder with good data and models that the case spoils.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from helpers.stages import finish


ROOT = Path(__file__).parents[2]


SFT, PAIR = "data/sft.jsonl", "outputs/tiny/preferences/preferences_train.jsonl"
MODEL, REWARD = "outputs/tiny/pretrain", "outputs/tiny/reward"
RECIPE = "recipes/tiny/sft.yaml"
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "food", "arguments": {"of": "cow"}}}],
}
CALLS = [USER, CALL, {"role": "tool", "content": "grass"}, ASSISTANT]
# All models that the comparison needs, the masked one wrong.
EVALUATED = (
    "--base_model",
    MODEL,
    "--masked_model",
    MODEL,
    "--ppo_model",
    "outputs/tiny/sft-model",
    "--sft_model",
    "outputs/tiny/sft-model",
)
SECRET = "hf_" + "Ab1" * 12


@dataclass
class Case:
    """One bad input.

    Args:
        what: the input, as the table shows it.
        options: of the command line.
        spoil: what is done to the good folder before.
        stage: whose script is run.
    """

    what: str
    options: tuple[str, ...] = ()
    spoil: Callable[[], object] = lambda: None
    stage: str = "sft"


def option(text: str, stage: str = "sft") -> Case:
    return Case(f"`{text.replace(SECRET, 'hf_…')}`", tuple(text.split()), stage=stage)


def recipe(line: str) -> Case:
    """A line that the recipe has more."""
    path = Path(RECIPE)
    shown = line.replace(SECRET, "hf_…").replace("\n", " ⏎ ")
    return Case(f"`{shown}`", (), lambda: path.write_text(path.read_text() + line + "\n"))


def whole_recipe(what: str, content: bytes | None) -> Case:
    return Case(what, (), lambda: Path(RECIPE).write_bytes(content) if content is not None else Path(RECIPE).unlink())


def row(value: object, path: str = SFT, stage: str = "sft") -> Case:
    """A row that the data have more."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    shown = text.decode("utf-8", "backslashreplace").replace("|", "\\|").replace("\0", "␀")

    def append() -> None:
        with open(path, "ab") as stream:
            stream.write(text + b"\n")

    return Case(f"`{shown[:90]}{'…' * (len(shown) > 90)}`", (), append, stage)


def file(what: str, name: str, content: bytes) -> Case:
    return Case(what, ("--data_files", name), lambda: Path(name).write_bytes(content))


def model(what: str, spoil: Callable[[], object], stage: str = "sft", options: tuple[str, ...] = ()) -> Case:
    return Case(what, options, spoil, stage)


def rewrite(path: str, change: Callable[[bytes], bytes]) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(change(Path(path).read_bytes()))


def setting(path: str, **values: object) -> Callable[[], object]:
    return rewrite(path, lambda content: json.dumps(json.loads(content) | values).encode())


def without_weights(pickled: bool) -> None:
    Path(MODEL, "model.safetensors").unlink()
    if pickled:
        import torch

        torch.save({"a": torch.zeros(1)}, Path(MODEL, "pytorch_model.bin"))


def checkpoint(what: str, spoil: Callable[[Path], object], options: tuple[str, ...]) -> Case:
    """A run that stopped, whose checkpoint 2 of 2 is spoilt."""
    return Case(what, ("--max_steps", "2", *options), lambda: spoil(half_a_run()), "sft")


def half_a_run() -> Path:
    """Leave what a run of two steps left: checkpoints, and no result."""
    folder = Path("outputs/tiny/sft")
    shutil.copytree(Path("stopped"), folder, dirs_exist_ok=True)
    return folder / "checkpoint-2"


CASES = {
    "Command line": [
        option("--learing_rate 1"),
        option("--learning_r 1"),
        option("--learning_rate fast"),
        option("--learning_rate -1"),
        option("--learning_rate nan"),
        option("--per_device_train_batch_size 0"),
        option("--gradient_accumulation_steps 0"),
        option("--num_train_epochs -1"),
        option("--max_length 0"),
        option("--seed -1"),
        option("--seed x"),
        option("--save_strategy never"),
        option("--optim adam"),
        option("--warmup_ratio 0.1"),
        option("--evaluation_strategy steps"),
        option("--overwrite_output_dir true"),
        option("--torch_dtype float32"),
        option("--max_seq_length 128"),
        option("--save_safetensors false"),
        option(f"--hub_token {SECRET}"),
        option(f"--token={SECRET}"),
        option(f'--model_init_kwargs {{"token":"{SECRET}"}}'),
        option("--enable_jit_checkpoint true"),
        option("--logging_nan_inf_filter true"),
        option("--resume_from_checkpoint outputs/x"),
        option("--save_only_model true"),
        option("--trust_remote_code true"),
        option("--hub_always_push true"),
        option("--resume outputs/nowhere"),
        option("sft.yaml"),
        option("--config other.yaml"),
        option("--data_files no.jsonl"),
        option("--data_files no*.jsonl"),
        option("--data_files data"),
        option("--data_files a.xyz"),
        option("--data_files a.csv b.txt"),
        option("--held_out_share 1.5 --eval_data_files"),
        option("--test_split_size 0.1"),
        option("--held_out_share 0.2"),
        option("--lora_r 8"),
        option("--load_in_4bit true"),
        option("--do_train true"),
        option("--save_steps 5"),
        option("--optim_args a=1"),
        option("--streaming true", "reward"),
        option("--mlm_probability 0.2", "pretrain"),
        option("--dtype bfloat16", "pretrain"),
        option("--model_name_or_path outputs/tiny/pretrain", "pretrain"),
        option("--kl_horizon 100", "ppo"),
        option("--max_steps 0"),
        option("--save_strategy steps --save_steps -1"),
        option("--logging_steps 0"),
        option("--save_total_limit 0"),
        option("--num_train_epochs 0"),
        option("--warmup_steps 1.5"),
        option("--label_smoothing_factor 5"),
        option("--neftune_noise_alpha -1"),
        option("--max_grad_norm -1"),
        option("--learning_rate inf"),
        option("--seed 4294967296"),
        option("--dataloader_num_workers -1"),
        option("--pad_to_multiple_of 0"),
        option("--use_peft true --lora_dropout 1"),
        option("--output_dir ~/out"),
        Case("`--output_dir` of 300 characters", ("--output_dir", "a" * 300)),
        option(f"--run_name {SECRET} --report_to tensorboard"),
        option("--max_length 4096"),
        option("--max_length 4096", "reward"),
        option("--block_size_tokens 512", "pretrain"),
        option("--max_new_tokens 4096 --output_dir out", "candidates"),
        option("--per_device_train_batch_size 1 --response_length 4096", "ppo"),
        option("--reward_model_path outputs/tiny/sft-model", "ppo"),
        option("--model_name_or_path outputs/tiny/nowhere"),
        option("--model_name_or_path ./nowhere"),
        option("--output_dir data"),
        option("--output_dir data/sft.jsonl"),
        option("--output_dir outputs/tiny/pretrain"),
        option("--ranker_agreement 0.4", "rank"),
        option("--judgements_per_prompt 9", "rank"),
        option("--candidates_per_prompt 1", "candidates"),
        option("--vocab_size 100", "tokenizer"),
        option("--vocab_size 99999999999", "tokenizer"),
        option("--objective rtd", "pretrain"),
        option("--block_size_tokens 1", "pretrain"),
        option('--model_config {"hidden_size":8}', "pretrain"),
        option('--model_config {"model_type":"llama","hiden_size":8}', "pretrain"),
        option('--model_config {"model_type"', "pretrain"),
        option('--model_config {"model_type":"bert","num_hidden_layers":1,"is_decoder":false}', "pretrain"),
        option('--model_config {"model_type":"qwen2","hidden_size":64,"num_hidden_layers":1}', "pretrain"),
        option("--num_mini_batches 0", "ppo"),
        option("--temperature 0", "ppo"),
        option("--kl_estimator k4", "ppo"),
        option("--dual_clip 0.5", "ppo"),
        option("--stop_token eos --stop_token_id 2", "ppo"),
        option("--best_of_n_prompt_file no.jsonl", "reward"),
    ],
    "Settings that a library refuses": [
        option("--adam_beta1 1.5"),
        option("--adam_beta2 1"),
        option("--adam_epsilon=-1e-8"),
        option("--lr_scheduler_type cosine_with_min_lr"),
        option('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":9}'),
        option('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":-1e-4}'),
        option('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}'),
        option('--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":"x"}'),
        option('--lr_scheduler_type inverse_sqrt --lr_scheduler_kwargs {"timescale":0}'),
        option("--lr_scheduler_type warmup_stable_decay"),
        option("--optim sgd --optim_args momentum=-1"),
        option("--optim sgd --optim_args momentum"),
        option("--optim sgd --optim_args momentun=0.9"),
        option("--optim adamw_8bit"),
        option("--optim galore_adamw --optim_target_modules attn"),
        option("--report_to wandb"),
        option("--report_to paper"),
        option("--use_liger_kernel true"),
        option("--attn_implementation flash_attention_2"),
        option("--deepspeed no.json"),
        option("--bf16 true --fp16 true"),
        option('--accelerator_config {"splitbatches":true}'),
        option('--gradient_checkpointing true --gradient_checkpointing_kwargs {"typo":1}'),
        option("--use_peft true --lora_target_modules typo"),
        option('--model_init_kwargs {"typo":1}'),
        option('--model_init_kwargs {"num_hidden_layers":0}'),
        option('--model_init_kwargs {"use_auth_token":"x"}'),
        option('--model_init_kwargs {"a":' + "[" * 30 + "]" * 30 + "}"),
        option("--metric_for_best_model typo --load_best_model_at_end true --eval_strategy steps --save_strategy steps"),
        option("--adam_beta2 -1", "reward"),
        option("--optim sgd --optim_args x=1", "reward"),
        option("--report_to mlflow", "ppo"),
        option('--lr_scheduler_type cosine --lr_scheduler_kwargs {"a":1}', "ppo"),
    ],
    "New models": [
        *(option(f'--model_config {{"model_type":"llama","hidden_size":8,"num_attention_heads":2,"num_hidden_layers":1,{field}}}', "pretrain") for field in (
            '"num_hidden_layers":0',
            '"num_attention_heads":0',
            '"num_attention_heads":3',
            '"num_key_value_heads":3',
            '"head_dim":3',
            '"hidden_size":-8',
            '"hidden_size":"8"',
            '"intermediate_size":1000000000000',
            '"max_position_embeddings":0',
            '"hidden_act":"typo"',
            '"attention_dropout":5.0',
            '"initializer_range":-1.0',
            '"rope_parameters":{"typo":1}',
            '"rope_parameters":{"rope_type":"typo","rope_theta":1.0}',
            '"rope_parameters":{"rope_type":"linear","rope_theta":1.0,"factor":0.5}',
        )),
        option('--model_config {"model_type":"gpt2","n_embd":8,"n_head":2,"n_layer":0}', "pretrain"),
        option('--model_config {"model_type":"gpt2","n_embd":8,"n_head":2,"n_layer":1,"n_positions":8}', "pretrain"),
        option('--objective mlm --model_config {"model_type":"bert","hidden_size":8,"num_attention_heads":2,"num_hidden_layers":0}', "pretrain"),
        option('--objective mlm --model_config {"model_type":"bert","hidden_size":8,"num_attention_heads":3,"num_hidden_layers":1}', "pretrain"),
        option("--objective mlm --mlm_probability 1.5", "pretrain"),
    ],
    "Recipe file": [
        recipe("env: {A=B: x}"),
        recipe("env: {A: [1]}"),
        recipe('env: {A: "a\\0b"}'),
        recipe("env: {RANK: 1}"),
        recipe(f"env: {{NAME: {SECRET}}}"),
        recipe("env: {ACCELERATE_MIXED_PRECISION: fp17}"),
        recipe(f"run_name: run-{SECRET}"),
        recipe("lr_scheduler_kwargs: {num_cycles: two}"),
        whole_recipe("a mapping 400 levels deep", b"model_init_kwargs: " + b"{a: " * 400 + b"1" + b"}" * 400),
        recipe("learing_rate: 1"),
        recipe("adam_beta1: [1, 2]"),
        recipe("save_steps: many"),
        recipe("seed: 1.5"),
        recipe("disable_tqdm: 1"),
        recipe("run_name: 5"),
        recipe("packing: maybe"),
        recipe("seed: 1\nseed: 2"),
        recipe("warmup_ratio: 0.1"),
        recipe("1: x"),
        recipe("<<: {seed: 1}"),
        recipe("seed: [1"),
        recipe("\tseed: 1"),
        recipe(f"hub_token: {SECRET}"),
        recipe(f"env: {{HF_TOKEN: {SECRET}}}"),
        recipe("env: [1]"),
        recipe("enable_jit_checkpoint: true"),
        recipe("held_out_share: 0.1"),
        recipe("eval_delay: 5"),
        recipe("datasets: [{path: json, slpit: test}]"),
        recipe("eval_datasets: json"),
        recipe("eval_strategy: sometimes"),
        whole_recipe("no such file", None),
        whole_recipe("an empty file", b""),
        whole_recipe("a list", b"- seed: 1\n"),
        whole_recipe("Latin-1 bytes", "run_name: é\n".encode("latin-1")),
        whole_recipe("an alias that holds itself", b"model_init_kwargs: &a {b: *a}\n"),
    ],
    "Data": [
        row(b'{"prompt": "Q", "comple'),
        row(b"[1, 2]"),
        row(b"5"),
        row({"question": "Q", "answer": "A"}),
        row({"prompt": None, "completion": "A"}),
        row({"prompt": [USER]}),
        row({"prompt": [], "completion": [ASSISTANT]}),
        row({"prompt": "Q", "completion": "A"}),
        row({"prompt": [USER], "completion": 5}),
        row({"prompt": [USER], "completion": ["A"]}),
        row({"prompt": [USER], "completion": [{"role": "assistant"}]}),
        row({"prompt": [USER], "completion": [{"role": "assistant", "content": 5}]}),
        row({"prompt": [USER], "completion": [{"role": "gpt", "content": "A"}]}),
        row({"prompt": [USER], "completion": [{"role": "assistant", "content": " "}]}),
        row({"prompt": [USER], "completion": [USER]}),
        row({"prompt": [USER], "completion": [ASSISTANT, USER]}),
        row({"prompt": [USER, USER], "completion": [ASSISTANT]}),
        row({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}),
        row({"prompt": [{"role": "user", "content": "a\0b"}], "completion": [ASSISTANT]}),
        row(b'{"prompt": [{"role": "user", "content": "\\ud800"}], "completion": [{"role": "assistant", "content": "A"}]}'),
        row('{"prompt": "é", "completion": "A"}'.encode("latin-1")),
        Case("a row that is there twice", (), lambda: _append(SFT, Path(SFT).read_bytes().splitlines()[0])),
        Case("a row of the evaluation data", (), lambda: _append(SFT, Path("data/sft_eval.jsonl").read_bytes().splitlines()[0])),
        file("an empty file", "a.jsonl", b""),
        file("blank lines only", "a.jsonl", b"\n\n"),
        file("a .gz file that is none", "a.jsonl.gz", b'{"text": "a"}\n'),
        file("CSV with another column", "a.csv", b"txet\na\n"),
        file("CSV with a gap", "a.csv", b"text,n\na,1\n,2\n"),
        file("CSV with a comma outside quotes", "a.csv", b"text\na\nb, c\n"),
        file("CSV with a quote that is not closed", "a.csv", b'text\na\n"b\nc\n'),
        file("text that is not UTF-8", "a.txt", "a\né\n".encode("latin-1")),
        file("half a JSON array", "a.json", b'[{"text": "a"'),
        file("a Parquet file that is none", "a.parquet", b"junk"),
        file("tool calls, which this chat format does not write", "a.jsonl", json.dumps({"messages": CALLS}).encode()),
        file("conversations without an answer", "a.jsonl", json.dumps({"messages": [USER]}).encode()),
        file("a conversation that the assistant begins", "a.jsonl", json.dumps({"messages": [ASSISTANT, USER, ASSISTANT]}).encode()),
        row({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, PAIR, "reward"),
        row({"prompt": [USER], "chosen": [ASSISTANT]}, PAIR, "reward"),
        row({"prompt": "Q", "chosen": "A", "rejected": "B"}, PAIR, "reward"),
        row({"prompt": " "}, "data/rlhf_prompts.jsonl", "ppo"),
        row({"prompt_id": "1", "prompt": "Q"}, "outputs/tiny/candidates/candidates.jsonl", "rank"),
        Case("all rows are too long", ("--max_length", "2"), stage="sft"),
        Case("too few prompts for one update", (), stage="ppo"),
    ],
    "Model folders": [
        model("no folder", lambda: shutil.rmtree(MODEL)),
        model("no config.json", Path(MODEL, "config.json").unlink),
        model("config.json is no JSON", lambda: Path(MODEL, "config.json").write_text("{")),
        model("an unknown architecture", setting(f"{MODEL}/config.json", model_type="gtp9")),
        model("no weights", lambda: without_weights(False)),
        model("weights in a pickle", lambda: without_weights(True)),
        model("truncated weights", rewrite(f"{MODEL}/model.safetensors", lambda content: content[:-9])),
        model("empty weights", lambda: Path(MODEL, "model.safetensors").write_bytes(b"")),
        model("generation settings that cannot be saved again", setting(f"{MODEL}/generation_config.json", early_stopping="soon")),
        model("no tokenizer", lambda: [path.unlink() for path in Path(MODEL).glob("tokenizer*")]),
        model("tokenizer.json is no JSON", lambda: Path(MODEL, "tokenizer.json").write_text("{")),
        model("a vocabulary that is smaller than the tokenizer's", lambda: _smaller(MODEL)),
        model("another tokenizer's reward model", lambda: _other_tokens(REWARD), "ppo"),
        model("the output folder is a link to nowhere", lambda: Path("outputs/tiny/sft").symlink_to("nowhere")),
        model("the output folder is in a link to nowhere", lambda: Path("link").symlink_to("nowhere"), options=("--output_dir", "link/sft")),
        model("a masked model that is none", lambda: None, "evaluate", EVALUATED),
        model("the model is the output folder", lambda: None, options=("--output_dir", MODEL)),
        model("a tokenizer folder as model", lambda: None, options=("--model_name_or_path", "outputs/tiny/tokenizer")),
        model("a stage that did not finish", lambda: Path(MODEL, "result.json").unlink()),
        model("the recipe.yaml of another run", rewrite(f"{MODEL}/recipe.yaml", lambda content: content + b"seed: 1\n")),
    ],
    "Checkpoints": [
        checkpoint("of another learning rate", lambda folder: None, ("--learning_rate", "0.5")),
        checkpoint("of another seed", lambda folder: None, ("--seed", "5")),
        checkpoint("of another batch size", lambda folder: None, ("--per_device_train_batch_size", "2")),
        checkpoint("of other data", lambda folder: _append(SFT, json.dumps({"prompt": [USER], "completion": [ASSISTANT]}).encode()), ()),
        checkpoint("named, a file missing", lambda folder: (folder / "optimizer.pt").unlink(), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, a file truncated", lambda folder: os.truncate(folder / "model.safetensors", 99), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, a bit flipped", lambda folder: _flip(folder / "model.safetensors"), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, no manifest", lambda folder: (folder / "MANIFEST.json").unlink(), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, a manifest of no files", lambda folder: setting(f"{folder}/MANIFEST.json", files={})(), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, half a manifest", lambda folder: (folder / "MANIFEST.json").write_text("{"), ("--resume", "outputs/tiny/sft/checkpoint-2")),
        checkpoint("named, the run's folder", lambda folder: None, ("--resume", "outputs/tiny/sft")),
    ],
}  # fmt: skip


def _append(path: str, line: bytes) -> None:
    with open(path, "ab") as stream:
        stream.write(line + b"\n")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def _smaller(folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _other_tokens(folder: str) -> None:
    from sandan.pretrain.tokenizer import train_tokenizer

    train_tokenizer(["entirely other words, of the same number"] * 9, 320).save_pretrained(folder)


# ---- Running ----


@dataclass
class Bench:
    """A folder with good data and models; each case gets a copy."""

    folder: Path
    good: Path = field(init=False)

    def __post_init__(self):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

        from sandan.pretrain.tokenizer import train_tokenizer

        self.good = self.folder / "good"
        shutil.copytree(ROOT / "recipes" / "tiny", self.good / "recipes" / "tiny")
        write = self.write
        answers = [{"prompt": [USER], "completion": [{**ASSISTANT, "content": f"A{n}"}]} for n in range(12)]
        write("data/sft.jsonl", answers[:8])
        write("data/sft_eval.jsonl", answers[8:])
        write("data/pretrain.jsonl", [{"text": f"The cow {n} eats grass."} for n in range(8)])
        write("data/pretrain_eval.jsonl", [{"text": "The frog."}])
        write("data/rlhf_prompts.jsonl", [{"prompt": [{**USER, "content": f"Q{n}"}]} for n in range(8)])
        write("data/minimal_pairs.jsonl", [{"skill": "grammar", "good": "The cow eats.", "bad": "The cow eat."}])
        write("data/eval_prompts.jsonl", [{"prompt": [{**USER, "content": "Q9"}]}])
        pairs = [
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": f"B{n}"}]}
            for n in range(8)
        ]
        finish((self.good / PAIR).parent)
        write(PAIR, pairs)
        write(
            "outputs/tiny/preferences/preferences_eval.jsonl", [{**pairs[0], "prompt": [{**USER, "content": "other"}]}]
        )
        write(
            "outputs/tiny/candidates/candidates.jsonl", [{"prompt_id": "0", "prompt": "Q", "candidates": ["A", "B"]}]
        )
        tokenizer = train_tokenizer(["The cow eats grass.", "QA"] * 20, 320)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **special, num_labels=1)
        torch.manual_seed(0)
        for name in ("tokenizer", "pretrain", "sft-model", "reward"):
            place = self.good / "outputs" / "tiny" / name
            finish(place)
            tokenizer.save_pretrained(place)
            if name != "tokenizer":
                (LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM)(config).save_pretrained(
                    place
                )
        for stage in ("candidates", "reward", "ppo"):
            path = self.good / "recipes" / "tiny" / f"{stage}.yaml"
            path.write_text(
                path.read_text().replace(
                    "model_name_or_path: outputs/tiny/sft", "model_name_or_path: outputs/tiny/sft-model"
                )
            )
        self.stop_a_run()

    def write(self, name: str, rows: list) -> None:
        path = self.good / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))

    def stop_a_run(self) -> None:
        """Make `stopped/`: the folder of a run of which the result is missing."""
        with self.copy():
            code, error = run_script("sft", ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2"))
            assert code == 0, error
            Path("outputs/tiny/sft/result.json").unlink()
            shutil.copytree("outputs/tiny/sft", self.good / "stopped")

    @contextlib.contextmanager
    def copy(self):
        before, environment = os.getcwd(), dict(os.environ)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            folder = Path(place) / "here"
            shutil.copytree(self.good, folder)
            os.chdir(folder)
            try:
                yield folder
            finally:
                os.chdir(before)
                os.environ.clear()
                os.environ.update(environment)

    def refusal(self, case: Case) -> str:
        """The one line that a case ends in; nothing that was there before may have changed."""
        with self.copy() as folder:
            case.spoil()
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            code, error = run_script(case.stage, case.options)
            assert code == 2, f"{case.what}: exit code {code}: {error[-1500:]}"
            assert "Traceback" not in error, error
            changed = [
                str(path) for path, content in before.items() if not path.is_file() or path.read_bytes() != content
            ]
            assert not changed, f"{case.what}: changed {changed}"
            assert not Path("outputs/tiny/sft/result.json").exists()
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0]), error
        return lines[0].removeprefix("error: ").replace(str(folder), "")


def run_script(stage: str, options: tuple[str, ...]) -> tuple[int, str]:
    """Run a script in this process: exit code and stderr."""
    script, error, before = str(ROOT / "scripts" / f"{stage}.py"), io.StringIO(), sys.argv
    config = () if "--config" in options else ("--config", f"recipes/tiny/{stage}.yaml")
    sys.argv = [script, *config, *options]
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        return left.code or 0, error.getvalue()
    finally:
        sys.argv = before
    return 0, error.getvalue()


def table(bench: Bench) -> str:
    """docs/bad_inputs.md."""
    lines = [
        "# Bad inputs, and what each gets",
        "",
        "Each of these ends in exit code 2 and this one line, before anything is trained or overwritten. The table is",
        "written by `tests/helpers/bad_inputs.py`, and a test compares it with what the scripts say. Where a line quotes a library,",
        f"its words are those of {versions()}.",
    ]
    for area, cases in CASES.items():
        lines += ["", f"## {area}", "", "| input | line |", "|---|---|"]
        for case in cases:
            stage = "" if case.stage == "sft" else f" ({case.stage})"
            lines.append(f"| {case.what}{stage} | {escaped(bench.refusal(case))} |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    """The libraries that some lines quote."""
    names = ("transformers", "trl", "datasets", "safetensors", "pyarrow")
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return ", ".join([python, *(f"{name} {metadata.version(name)}" for name in names)])


def escaped(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|').replace('`', chr(39))}`"


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        print(table(Bench(Path(folder))), end="")
