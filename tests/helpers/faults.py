"""Kill training stages and look whether the run that goes on is the run that was not killed, bit for bit.

    python tests/helpers/faults.py FOLDER --kills 5        # what `make test-faults` runs; prints a table

Every run is a real script in a process forked from this one, which has the imports behind it but no thread yet.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path


ROOT = Path(__file__).parents[2]


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

STAGES = ("clm", "mlm", "sft", "reward", "ppo")
KINDS = ("SIGKILL", "SIGTERM", "SIGKILL in a save")
REQUEUE_EXIT_CODE = 75
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Values that tell the time.
TIMED = ("time/", "_runtime", "_per_second", "eps", "_preparation_time")
# Saves, evaluations and logs that do not fall together; dropout, so that random numbers matter.
OFTEN = (
    "--save_strategy steps --save_steps 7 --eval_strategy steps --eval_steps 5 --logging_steps 3 --save_total_limit 3"
)
COMMON = f"{OFTEN} --max_steps 40 --per_device_train_batch_size 4 --dataloader_num_workers 0 --disable_tqdm true"
MODELS = {
    "clm": {"model_type": "llama", "attention_dropout": 0.1, **SIZES},
    "mlm": {"model_type": "modernbert", "mlp_dropout": 0.1, **SIZES},
}


def command(stage: str, folder: Path, output: Path) -> tuple[str, list[str]]:
    """The script of a stage, and its arguments."""
    data = ["--data_files", str(folder / f"{stage}.jsonl"), "--eval_data_files", str(folder / f"{stage}_eval.jsonl")]
    if stage in MODELS:
        model = json.dumps(MODELS[stage] | {"max_position_embeddings": 64})
        recipe, own = "pretrain" if stage == "clm" else "pretrain_mlm", ["--block_size_tokens", "32"]
        own += ["--model_config", model, "--tokenizer_name_or_path", str(folder / "model")]
    elif stage == "ppo":
        recipe, own = "ppo", "--total_episodes 80 --gradient_accumulation_steps 1 --per_device_eval_batch_size 8"
        own = [
            *own.split(),
            *["--response_length", "8", "--per_device_train_batch_size", "8", "--policy_ema_decay", "0.9"],
        ]
        own += ["--model_name_or_path", str(folder / "model"), "--reward_model_path", str(folder / "classifier")]
    else:
        recipe, own = stage, ["--model_name_or_path", str(folder / "model")]
        own += ["--oracle", "none"] if stage == "reward" else []
    common = OFTEN.split() if stage == "ppo" else COMMON.split()
    config = ROOT / "recipes" / "tiny" / f"{recipe}.yaml"
    script = ROOT / "scripts" / f"{recipe.removesuffix('_mlm')}.py"
    return str(script), ["--config", str(config), *common, *own, *data, "--output_dir", str(output)]


def prepare(folder: Path) -> None:
    """Data, a tokenizer and models of a toy's size."""
    rows = [json.loads(line) for line in (ROOT / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:160]]
    texts = [f"{row['prompt'][0]['content']} {row['completion'][0]['content']}" for row in rows]
    swapped = [rows[index - 1]["completion"] for index in range(len(rows))]
    kinds = {
        "clm": [{"text": text} for text in texts],
        "mlm": [{"text": text} for text in texts],
        "sft": rows,
        "reward": [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
            for row, other in zip(rows, swapped, strict=True)
            if row["completion"] != other
        ],
        "ppo": [{"prompt": row["prompt"]} for row in rows],
    }
    for name, content in kinds.items():
        for suffix, part in (("", content[:-16]), ("_eval", content[-16:])):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{name}{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")
    if forked(lambda: make_models(folder, texts)):
        raise RuntimeError("the models could not be made; the cause is above")


def make_models(folder: Path, texts: list[str]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from sandan.pretrain.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts, vocab_size=400)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    config = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, **SIZES, **special, num_labels=1)
    for name, kind in (("model", LlamaForCausalLM), ("classifier", LlamaForSequenceClassification)):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---- Processes ----


def forked(action) -> int:
    """Run `action` in a fork and wait: its exit code, negative for a signal."""
    return wait(start(action))


def start(action) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_stage(stage: str, folder: Path, output: Path, die_at_write: int | None = None, *more: str) -> None:
    """In a fork: be the script; with `die_at_write`, be killed when it opens that file of a checkpoint."""
    log = os.open(output.parent / f"{output.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    if die_at_write is not None:
        die_while_saving(die_at_write)
    script, arguments = command(stage, folder, output)
    sys.argv = [script, *arguments, *more]
    runpy.run_path(script, run_name="__main__")


def die_while_saving(number: int) -> None:
    left = [number]

    def watch(event, arguments):
        if event in ("open", "os.rename") and ".saving" in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def outcome(output: Path) -> dict:
    """What must not depend on whether a run was interrupted: weights and every number that was logged or reported."""
    state = json.loads((output / "trainer_state.json").read_text())
    history = [
        {k: v for k, v in entry.items() if not k.startswith(TIMED) and not k.endswith(TIMED)}
        for entry in state["log_history"]
    ]
    result = json.loads((output / "result.json").read_text())["metrics"]
    evaluated = {key: value for key, value in result.items() if key.startswith("eval")}
    weights = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*.safetensors"))
        if not any(part.startswith((".", "checkpoint-")) for part in path.relative_to(output).parts)
    }
    return {
        "weights": weights,
        "history": [entry for entry in history if "train_loss" not in entry],
        "metrics": evaluated,
    }


def difference(one: dict, other: dict) -> str | None:
    """The first thing in which two outcomes differ."""
    for name, weights in one["weights"].items():
        if other["weights"].get(name) != weights:
            return f"weights of {name}"
    for before, after in zip(one["history"], other["history"], strict=False):
        if before != after:
            return f"log: {before} became {after}"
    if len(one["history"]) != len(other["history"]):
        return f"log: {len(one['history'])} entries became {len(other['history'])}"
    return None if one == other else f"metrics: {one['metrics']} became {other['metrics']}"


@contextmanager
def checked(what: str):
    """Say which case an assertion is about."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


class Matrix:
    """The uninterrupted run of each stage, and runs that are killed and go on."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.rng = folder, random.Random(seed)
        self.whole: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        prepare(folder)

    def run_whole(self, stage: str) -> None:
        output, started = self.folder / f"{stage}-whole", time.monotonic()
        code = forked(lambda: run_stage(stage, self.folder, output))
        assert code == 0, f"{stage}: {self.log(output)}"
        self.seconds[stage] = time.monotonic() - started
        self.whole[stage] = outcome(output)

    def log(self, output: Path) -> str:
        return (output.parent / f"{output.name}.log").read_text(errors="replace")[-2000:]

    def kill_and_go_on(self, stage: str, kind: str, number: int) -> str:
        """Kill a run, start it again, compare; where it was killed, in words."""
        output = self.folder / f"{stage}-{kind.replace(' ', '-')}-{number}"
        with checked(f"{stage}, {kind} {number}"):
            where = self.kill(stage, kind, output)
            code = forked(lambda: run_stage(stage, self.folder, output))
            assert code == 0, f"the run that goes on ended with {code}: {self.log(output)}"
            different = difference(self.whole[stage], outcome(output))
            assert different is None, f"killed {where}: {different}"
        return where

    def kill(self, stage: str, kind: str, output: Path) -> str:
        if kind == "SIGKILL in a save":
            at = self.rng.randrange(30, 260)
            while (code := forked(partial(run_stage, stage, self.folder, output, at))) == 0:
                # The run has opened fewer files than that.
                shutil.rmtree(output)
                at //= 2
            assert code == -signal.SIGKILL, f"it ended with {code}: {self.log(output)}"
            return f"opening file {at}, {left_behind(output)}"
        child = start(lambda: run_stage(stage, self.folder, output))
        # From the moment at which the folder is there: the run has been set up.
        delay = self.rng.uniform(0.2, 0.95) * self.seconds[stage]
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL if kind == "SIGKILL" else signal.SIGTERM)
        code = wait(child)
        expected = (-signal.SIGKILL, 0) if kind == "SIGKILL" else (REQUEUE_EXIT_CODE, 0)
        assert code in expected, f"after {delay:.2f} s it ended with {code}: {self.log(output)}"
        return f"after {delay:.2f} s, {left_behind(output)}"


def left_behind(output: Path) -> str:
    names = sorted(
        path.name for path in output.glob("*") if path.name.startswith(("checkpoint-", ".saving", "result"))
    )
    return "left " + (", ".join(names) or "nothing")


def preload() -> None:
    """Import what the scripts import, without starting a thread."""
    import datasets  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, ModernBertForMaskedLM  # noqa: F401

    import sandan.pretrain.model_and_blocks
    import sandan.reward.trainer
    import sandan.sft.trainer
    import sandan.training.train_and_save  # noqa: F401
    from sandan import PPOTrainer  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5, help="of each kind and stage")
    parser.add_argument("--stages", nargs="+", default=STAGES)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    preload()
    matrix = Matrix(options.folder, options.seed)
    for stage in options.stages:
        matrix.run_whole(stage)
        for kind in options.kinds:
            where = [matrix.kill_and_go_on(stage, kind, number) for number in range(options.kills)]
            print(
                f"{stage}: {kind}: {len(where)} of {options.kills} went on bit for bit",
                *where,
                sep="\n    ",
                flush=True,
            )


if __name__ == "__main__":
    main()
