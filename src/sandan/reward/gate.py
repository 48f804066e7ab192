"""The gate before PPO: a test whether the reward model can pick good answers from samples."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.bootstrap import bootstrap_interval
from ..core.errors import GateError
from ..core.stage import Stage
from ..data.jsonl import read_jsonl
from ..models.checks import check_prompts, config_of
from ..models.loading import load_causal_lm
from ..models.rendering import Prompt, encode_prompts
from ..models.sampling import sample_completions
from ..models.scoring import score_completions


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BEST_OF = (1, 2, 4, 8)


@dataclass
class RewardArguments:
    """Settings of the reward stage: extra and weighted pairs, and the test before PPO may use the model."""

    oracle: Literal["world", "none"] = field(
        default="none", metadata={"help": "Who judges best-of-n: the embedded world's oracle, or nobody."}
    )
    best_of_n_prompt_file: str | None = field(default=None, metadata={"help": "JSONL of unseen prompts."})
    best_of_n_prompts: int = field(default=150, metadata={"help": "How many of them to use."})
    best_of_n_gain: float = field(
        default=0.05,
        metadata={"help": "Least gain in oracle score of best-of-8 over best-of-1; less stops the chain."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest best-of-n answer, in tokens."})
    broken_answer_share: float = field(
        default=0.0,
        metadata={"help": "Add so many pairs, as a share of all, of a real answer above a damaged copy of it."},
    )
    use_margin: bool = field(default=False, metadata={"help": "Train with the pairs' margins (Llama 2, eq. 2)."})
    pair_weighting: Literal["pair", "prompt"] = field(
        default="pair",
        metadata={"help": "What counts as one: each pair, or all pairs of a prompt together (InstructGPT, eq. 1)."},
    )

    def __post_init__(self):
        if self.oracle != "none" and self.best_of_n_prompt_file is None:
            raise ValueError("best_of_n_prompt_file: missing; the oracle judges best-of-n on unseen prompts")
        if not 0 <= self.broken_answer_share <= 1:
            raise ValueError(f"broken_answer_share: {self.broken_answer_share}; a share lies between 0 and 1")


def best_of_n(true_scores: np.ndarray, proxy_scores: np.ndarray) -> dict[int, np.ndarray]:
    """Return, for each n, the true score `(prompts,)` of the answer that the proxy picks among the first n samples.

    Args:
        true_scores, proxy_scores: `(prompts, samples)`, samples in the order drawn.
    """
    rows = np.arange(len(true_scores))
    return {n: true_scores[rows, proxy_scores[:, :n].argmax(axis=1)] for n in BEST_OF if n <= true_scores.shape[1]}


def check_gate(curve: dict[int, np.ndarray], least_gain: float) -> dict[str, float]:
    """Return the best-of-n curve as metrics, and refuse a reward model that cannot pick good answers.

    Raises:
        GateError: if best-of-8 is not clearly better than best-of-1. A reward model that cannot pick good answers from
            samples will be exploited by PPO, whatever its pair accuracy.
    """
    metrics = {f"best_of_n/{n}": float(scores.mean()) for n, scores in curve.items()}
    most = max(curve)
    gain, low, high = bootstrap_interval(curve[most] - curve[1])
    metrics |= {"best_of_n/gain": gain, "best_of_n/gain_low": low}
    if low <= 0 or gain < least_gain:
        raise GateError(
            f"best-of-{most} by the reward model is not clearly better than best-of-1: "
            f"oracle score {metrics['best_of_n/1']:.3f} -> {metrics[f'best_of_n/{most}']:.3f}, "
            f"gain {gain:+.3f} [{low:+.3f}, {high:+.3f}], {least_gain:+.3f} asked; "
            "PPO would exploit it: rank more prompts, or train SFT longer so that candidates hold good answers"
        )
    return metrics


def best_of_n_prompts(
    args: RewardArguments, tokenizer: "PreTrainedTokenizerBase", sft_path: str, stage: Stage
) -> list[Prompt]:
    """Return the prompts of the test. Called before training too, so that a mistake in them is found then.

    Raises:
        UserError: if the file is missing or malformed, or prompt and answer do not fit into the SFT model's positions.
    """
    rows = read_jsonl(stage.add_input(args.best_of_n_prompt_file), columns=[("prompt",)])[: args.best_of_n_prompts]
    prompts = [row["prompt"] for row in rows]
    if (config := config_of(sft_path)) is not None:
        lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
        check_prompts(lengths, args.max_new_tokens, "max_new_tokens", config, sft_path)
    return prompts


def gate(
    args: RewardArguments, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", sft_path: str, stage: Stage
) -> dict[str, float]:
    """Sample from the SFT model on unseen prompts, let the reward model pick answers and the oracle judge them.

    Raises:
        GateError: as [`check_gate`].
    """
    from ..world.oracle import judge

    prompts = best_of_n_prompts(args, tokenizer, sft_path, stage)
    most = max(BEST_OF)
    sampled = sample_completions(
        load_causal_lm(sft_path),
        tokenizer,
        prompts,
        args.max_new_tokens,
        samples_per_prompt=most,
        seed=stage.seed,
        description="best-of-n",
    )
    flat = [(prompt, answer) for prompt, answers in zip(prompts, sampled, strict=True) for answer in answers]
    proxy = score_completions(model, tokenizer, [prompt for prompt, _ in flat], [answer for _, answer in flat])
    true = [judge(prompt, answer.text).score for prompt, answer in flat]
    true, proxy = np.reshape(true, (-1, most)), np.reshape(proxy, (-1, most))
    chosen = best_of_n(proxy, proxy)
    proxies = {f"best_of_n_proxy/{n}": float(scores.mean()) for n, scores in chosen.items()}
    return check_gate(best_of_n(true, proxy), args.best_of_n_gain) | proxies
