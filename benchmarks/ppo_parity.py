"""Comparison of `sandan.PPOTrainer` with TRL 1.12.0's (the last one), number by number, on the same inputs.

    python benchmarks/ppo_parity.py
    python benchmarks/ppo_parity.py --env_dir DIR --output parity.json

Both trainers get the same weights, prompts and answers. The first run makes a virtual environment and installs
`trl==1.12.0` there (the only step that needs the network); every other package is that of the running interpreter, so
both trainers use the same torch and transformers. To run TRL on other versions than sandan, install them there too:

    python benchmarks/ppo_parity.py --env_dir DIR --packages transformers==5.20.0

Prints JSON: for each case and quantity the largest absolute difference and a verdict, which is "agrees" (to float32
precision) or the defect of TRL that explains the difference (docs/ppo.md lists the defects). Exit code 1 if a
difference has no explanation, or if an expected difference does not occur.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
SIDE = Path(__file__).with_name("ppo_parity_side.py")
DEFAULT_ENV_DIR = ROOT / ".bench" / "trl-1.12"
TRL = "trl==1.12.0"
# Differences of float32 sums in another order; the second is relative to the largest value of the quantity.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-6, 1e-5

EXPLANATIONS = {
    "C2": "TRL stops sampling with the longest answer, so that one's score is paid at its stop token, not after it",
    "T1": "num_mini_batches has no effect on the number of optimizer steps",
    "T2": "logged means are diluted by zeros that are never filled in",
    "T3": "accumulation is switched off on the last batch of each pass over the data",
    "T10": "max_grad_norm is ignored",
    "T11": "logged approximate KL, ratio and entropy include padding; "
    "ratio_var is that of micro-batch means (NaN of one)",
    "T12": "Adam's epsilon is 1e-8",
    "T13": "the model's own generation_config leaks into sampling and into the old log-probs",
    "T15": "penalty and EOS count look for EOS, not for the stop token",
    "T16": "losses are means of micro-batch means",
    "steps": "not a defect: TRL's logged step is an update, sandan's an optimizer step",
}
# The pace (episodes per second) differs from run to run.
NOT_COMPARED = {"log eps"}
# Groups of quantities that change together.
CREDIT = ("token rewards", "advantages", "returns")
POLICY_LOSS, LOGGED_POLICY_LOSS = "policy loss, first step", "log loss/policy_avg"
VALUE_LOSS, LOGGED_VALUE_LOSS = "value loss, first step", "log loss/value_avg"
VALUE_LOSSES = (VALUE_LOSS, LOGGED_VALUE_LOSS)
LOSSES = (POLICY_LOSS, LOGGED_POLICY_LOSS, *VALUE_LOSSES)
LEARNING = ("first gradient", "weights after the update")
KL_LOGS = ("log objective/kl", "log objective/entropy", "log objective/non_score_reward", "log objective/rlhf_reward")
RATIO_LOGS = ("log policy/approxkl_avg", "log val/ratio", "log val/ratio_var")
CLIP_LOGS = ("log policy/clipfrac_avg", "log val/clipfrac_avg")
ENTROPY = "log policy/entropy_avg"
# In the first epoch the ratio is 1 with or without padding, but the variance of one micro-batch is undefined.
FIRST_EPOCH_T11 = (ENTROPY, "log val/ratio_var")
STEP = ("log step",)

SETTINGS = {
    "seed": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "num_sample_generations": 0,
    "logging_steps": 1,
    "total_episodes": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "response_length": 12,
    "stop_token": "eos",
    "num_ppo_epochs": 2,
    # Adam divides by the size of gradients, which would enlarge the rounding errors of the smallest ones.
    "optim": "sgd",
    # Large enough for clipping to be active in the second epoch.
    "learning_rate": 0.2,
    # TRL steps its schedule once per update, sandan once per optimizer step.
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
ONE_EPOCH = {"num_ppo_epochs": 1}
IN_MICRO_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
VOCABULARY, PAD, EOS, OTHER_STOP, FIRST_WORD = 64, 0, 1, 5, 6


@dataclass
class Case:
    """A case: one update with certain settings.

    Args:
        settings: differences from `SETTINGS`.
        answers: "ragged" (some of full length without a stop token), "early" (all stop before the full length) or
            "full" (all of full length).
        rows: prompts in the dataset; 8 is exactly one update.
        generation: values for the policy's own generation_config.
        explained: defect of TRL -> the quantities that differ because of it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    answers: str = "ragged"
    rows: int = 16
    generation: dict[str, Any] = field(default_factory=dict)
    explained: dict[str, Sequence[str]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return everything that a side needs to run the case."""
        settings = {name: value for name, value in (SETTINGS | self.settings).items() if value is not None}
        numbers = random.Random(0)
        stop = settings.get("stop_token_id", EOS)
        prompts = [[numbers.randrange(FIRST_WORD, VOCABULARY) for _ in range(4 + row % 3)] for row in range(self.rows)]
        width = settings["response_length"]
        answers = {str(prompt): answer(self.answers, row, width, stop, numbers) for row, prompt in enumerate(prompts)}
        return {"settings": settings, "generation": self.generation, "prompts": prompts, "answers": answers}


CASES = {
    "one micro-batch": Case(explained={"T11": (*RATIO_LOGS, ENTROPY), "steps": STEP}),
    "k3, whitened rewards, penalty, gamma": Case(
        {
            "kl_estimator": "k3",
            "kl_coef": 0.3,
            "whiten_rewards": True,
            "missing_eos_penalty": 1.0,
            "gamma": 0.98,
            "temperature": 1.0,
        },
        explained={"T11": (*RATIO_LOGS, ENTROPY), "steps": STEP},
    ),
    "micro-batches of equal lengths": Case(
        IN_MICRO_BATCHES, answers="full", explained={"T11": ("log val/ratio_var",), "steps": STEP}
    ),
    "micro-batches": Case(
        IN_MICRO_BATCHES | ONE_EPOCH,
        explained={"T11": (ENTROPY,), "T16": (*LOSSES, *LEARNING)},
    ),
    "two minibatches": Case(
        {"num_mini_batches": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | ONE_EPOCH,
        explained={
            "T1": ("optimizer steps", POLICY_LOSS, VALUE_LOSS, *LEARNING, "log policy/approxkl_avg", *CLIP_LOGS),
            "T2": (LOGGED_POLICY_LOSS, LOGGED_VALUE_LOSS, "log val/ratio", "log val/ratio_var", ENTROPY),
            "steps": STEP,
        },
    ),
    "a dataset of one batch": Case(
        {"learning_rate": 1.0} | IN_MICRO_BATCHES | ONE_EPOCH,
        answers="full",
        rows=8,
        explained={"T3": ("optimizer steps", *LOSSES, *LEARNING, *RATIO_LOGS, *CLIP_LOGS, ENTROPY)},
    ),
    "gradient clipping": Case(
        {"max_grad_norm": 0.01} | ONE_EPOCH, explained={"T10": LEARNING, "T11": FIRST_EPOCH_T11}
    ),
    "Adam's epsilon left at its default": Case(
        {"optim": "adamw_torch", "learning_rate": 1e-3} | ONE_EPOCH,
        explained={"T12": LEARNING[1:], "T11": FIRST_EPOCH_T11},
    ),
    "a repetition penalty in generation_config": Case(
        ONE_EPOCH,
        generation={"repetition_penalty": 1.3},
        explained={
            "T13": ("log-probs", *CREDIT, *KL_LOGS, *LOSSES, *LEARNING, *RATIO_LOGS[:2], CLIP_LOGS[0]),
            "T11": FIRST_EPOCH_T11,
        },
    ),
    "a penalty and another stop token": Case(
        {"stop_token": None, "stop_token_id": OTHER_STOP, "missing_eos_penalty": 1.0} | ONE_EPOCH,
        explained={
            "T15": (
                "scores",
                *CREDIT,
                *VALUE_LOSSES,
                *LEARNING,
                "log objective/scores",
                "log objective/rlhf_reward",
                "log val/num_eos_tokens",
            ),
            "T11": FIRST_EPOCH_T11,
        },
    ),
    "every answer stops early": Case(
        ONE_EPOCH,
        answers="early",
        explained={"C2": ("value mask", "values", *CREDIT, *VALUE_LOSSES, *LEARNING), "T11": FIRST_EPOCH_T11},
    ),
}


def answer(kind: str, row: int, width: int, stop: int, numbers: random.Random) -> list[int]:
    """Return the tokens of one answer, its stop token included."""
    stops, length = {
        "ragged": (row % 3 > 0, numbers.randint(1, width) if row % 3 else width),
        "early": (True, numbers.randint(1, width - 3)),
        "full": (row % 2 > 0, width),
    }[kind]
    tokens = [numbers.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]
    return [*tokens[:-1], stop] if stops else tokens


def write_models(folder: Path) -> None:
    """Save tokenizer, policy, reference (close to the policy, so that the KL is not 0), reward model and critic."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = {"[PAD]": PAD, "</s>": EOS} | {f"w{index}": index for index in range(2, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    special = {"pad_token": "[PAD]", "eos_token": "</s>", "unk_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=EOS,
        # With small weights all log-probs would be almost the same.
        initializer_range=0.2,
        num_labels=1,
    )
    policy = LlamaForCausalLM(config)
    policy.save_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    policy.save_pretrained(folder / "ref_model")
    for name in ("reward_model", "value_model"):
        LlamaForSequenceClassification(config).save_pretrained(folder / name)


def make_environment(env_dir: Path, packages: Sequence[str]) -> Path:
    """Make a virtual environment, once, with TRL 1.12.0 and otherwise the packages of this interpreter.

    Returns:
        The path of its interpreter.
    """
    interpreter, marker = env_dir / "bin" / "python", env_dir / "packages.json"
    shared = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    wanted = json.dumps({"installed": [TRL, *packages], "shared": shared})
    if marker.exists():
        if marker.read_text(encoding="utf-8") != wanted:
            raise SystemExit(f"error: {env_dir} holds {marker.read_text()}, not {wanted}; give another --env_dir")
        return interpreter
    print(f"making {env_dir}: {TRL}, other packages from {shared[0]}", file=sys.stderr)
    # The shared packages have another version of TRL: without `--ignore-installed` pip would not install this one.
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--ignore-installed", "--no-deps"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env_dir)], check=True)
        own = sysconfig.get_path("purelib", vars={"base": str(env_dir), "platbase": str(env_dir)})
        # The environment's own packages come first on sys.path, so its TRL hides the shared one.
        Path(own, "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
        subprocess.run([*pip, "--quiet", "--disable-pip-version-check", TRL, *packages], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {env_dir} could not be made (it needs the network once): {error}") from error
    marker.write_text(wanted, encoding="utf-8")
    return interpreter


def run_side(side: str, interpreter: Path | str, work_dir: Path) -> dict[str, str]:
    """Run all cases with one trainer; return the versions of its packages."""
    source = str(ROOT / "src") if side == "sandan" else ""
    settings = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(interpreter), str(SIDE), side, str(work_dir)],
        check=False,
        env=os.environ | settings,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise SystemExit(f"error: the side {side} failed\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads((work_dir / side / "versions.json").read_text(encoding="utf-8"))


def compare(
    ours: "dict[str, torch.Tensor]", theirs: "dict[str, torch.Tensor]", explained: dict[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Compare the quantities of both trainers with the expected differences.

    Returns:
        For each quantity of TRL: `max_abs_difference`, `largest` (the largest absolute value in TRL) and `verdict`:
        "agrees", a key of `EXPLANATIONS`, "UNEXPLAINED", "MISSING" (sandan does not have it) or "NOT SHOWN" (an
        expected difference does not occur).
    """
    causes = {quantity: defect for defect, quantities in explained.items() for quantity in quantities}
    rows = {}
    for name in sorted(theirs.keys() - NOT_COMPARED):
        if name not in ours:
            rows[name] = {"max_abs_difference": None, "largest": None, "verdict": "MISSING"}
            continue
        difference = (ours[name].double() - theirs[name].double()).abs().max().item()
        largest = theirs[name].double().abs().max().item()
        same = difference <= ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * largest
        if name in causes:
            verdict = "NOT SHOWN" if same else causes[name]
        else:
            verdict = "agrees" if same else "UNEXPLAINED"
        # TRL logs NaN as the variance of a single micro-batch, and JSON has no NaN.
        numbers = {"max_abs_difference": difference, "largest": largest}
        rows[name] = {key: value if math.isfinite(value) else None for key, value in numbers.items()} | {
            "verdict": verdict
        }
    return rows


def passed(quantities: dict[str, dict[str, Any]]) -> bool:
    """Return whether every quantity of a case agrees or differs by a known defect."""
    return all(row["verdict"] in {"agrees", *EXPLANATIONS} for row in quantities.values())


def processor() -> str:
    """Return the name of the CPU (on Linux; elsewhere of the architecture) and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, 1 thread"


def measure(env_dir: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Run both sides on every case and compare them."""
    from safetensors.torch import load_file

    interpreter, started = make_environment(env_dir, packages), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ppo_parity_") as folder:
        work_dir = Path(folder)
        write_models(work_dir)
        described = {name: case.describe() for name, case in CASES.items()}
        (work_dir / "cases.json").write_text(json.dumps(described), encoding="utf-8")
        versions = {
            side: run_side(side, python, work_dir)
            for side, python in (("sandan", sys.executable), ("trl", interpreter))
        }
        cases = {}
        for name, case in CASES.items():
            ours, theirs = (load_file(work_dir / side / f"{name}.safetensors") for side in ("sandan", "trl"))
            cases[name] = compare(ours, theirs, case.explained)
    return {
        "verdict": "parity" if all(map(passed, cases.values())) else "DIFFERENT",
        "tolerance": f"{ABSOLUTE_TOLERANCE} + {RELATIVE_TOLERANCE} x the largest absolute value",
        "date": datetime.date.today().isoformat(),
        "hardware": processor(),
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions,
        "explanations": EXPLANATIONS,
        "cases": cases,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env_dir", type=Path, default=DEFAULT_ENV_DIR, help="environment of TRL (default: %(default)s)"
    )
    parser.add_argument("--packages", nargs="+", default=[], help="further packages for it, as pip names them")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    result = measure(args.env_dir, args.packages)
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if result["verdict"] == "parity" else 1


if __name__ == "__main__":
    sys.exit(main())
