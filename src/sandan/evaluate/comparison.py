"""Comparison of base, SFT and PPO models on prompts that none of them saw, by judges that training did not use."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..constraints.prompts import CHECKED
from ..core.bootstrap import bootstrap_interval
from ..core.errors import UserError
from ..data.chat import prompt_text
from ..models.checks import positions_of
from ..models.loading import check_vocabulary, load_masked_lm, load_tokenizer
from ..models.rendering import Prompt, batched, encode_prompts, pad_rows
from ..models.sampling import Completion, sample_completions
from ..models.scoring import score_completions
from ..models.tokens import document_end, document_start
from ..ppo.collapse import answer_figures
from ..world.generate import NEW_COMBINATIONS, PRETRAINING_ONLY
from .judges import Judge
from .win_rates import named, win_rates


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Group of prompts -> prefix of its oracle scores; prompts without a group count as new combinations.
GROUP_PREFIXES = {NEW_COMBINATIONS: "oracle", PRETRAINING_ONLY: "oracle_pretraining_only"}
# A judge's scores of a model's answers, and the lengths of these in tokens.
Scores = tuple[list[float], list[int]]
ORACLE_SCORES = ("helpful", "accurate", "safe", "natural")


@dataclass
class EvaluateArguments:
    """Settings of the comparison: the models, the prompts and texts, the judges and the sampling."""

    output_dir: str = field(metadata={"help": "Folder of comparison.json, samples.jsonl and result.json."})
    sft_model: str = field(metadata={"help": "The fine-tuned model; KL is measured to it."})
    ppo_model: str = field(metadata={"help": "The model after RLHF."})
    base_model: str | None = field(default=None, metadata={"help": "The pretrained model, if it is compared too."})
    reward_model: str | None = field(default=None, metadata={"help": "Scores every answer, if given."})
    gold_reward_model: str | None = field(
        default=None, metadata={"help": "Independent judge: a reward model that no stage trained with."}
    )
    gold_functions: list[str] | None = field(
        default=None, metadata={"help": "Independent judges: functions (prompts, completions), as module:function."}
    )
    masked_model: str | None = field(default=None, metadata={"help": "Joins the minimal pairs, if given."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use only the first so many prompts."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Leave out longer prompts (counted)."})
    text_file: str | None = field(default=None, metadata={"help": "JSONL of held-out text for bits per byte."})
    minimal_pairs_file: str | None = field(default=None, metadata={"help": "JSONL of skill, good, bad."})
    oracle: Literal["world", "none"] = field(default="none", metadata={"help": "Who judges the answers."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=128, metadata={"help": "Answers sampled at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


def oracle_metrics(
    prompts: Sequence[Prompt], answers: Sequence[str], groups: Sequence[str], judge: Callable[[Any, str], Any]
) -> tuple[dict[str, float], list[Any]]:
    """Return mean oracle scores of each group of prompts, and the judgement of each answer.

    `score` and `correct` come with 95% bootstrap intervals.
    """
    judged = [judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    metrics: dict[str, float] = {}
    for group, prefix in GROUP_PREFIXES.items():
        own = [judgement for judgement, name in zip(judged, groups, strict=True) if name == group]
        if not own:
            continue
        for name in ORACLE_SCORES:
            metrics[f"{prefix}/{name}"] = sum(getattr(judgement, name) for judgement in own) / len(own)
        for name in ("score", "correct"):
            values = [float(getattr(judgement, name)) for judgement in own]
            metrics |= named(f"{prefix}/{name}", *bootstrap_interval(values))
    return metrics, judged


def compare(
    models: dict[str, "PreTrainedModel"],
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, Any]],
    args: EvaluateArguments,
    reward_model: "PreTrainedModel | None" = None,
    texts: Sequence[str] = (),
    judges: Sequence[Judge] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return every model's row of the comparison table, and a table of sample answers.

    Args:
        models: name -> model; the KL is measured to the one named `sft`.
        rows: unseen prompts with `prompt` and optionally `group`.
        texts: held-out documents for bits per byte.
        judges: independent ones; each model is also compared with the one before it. Rows in IFEval's form are checked
            by its checkers besides.
    """
    prompts = [row["prompt"] for row in rows]
    groups = [row.get("group", NEW_COMBINATIONS) for row in rows]
    samples = [{"prompt": prompt_text(row["prompt"]), "group": group} for row, group in zip(rows, groups, strict=True)]
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
    comparison: list[dict[str, Any]] = []
    before: dict[str, Scores] = {}
    for name, model in models.items():
        answers = sample_answers(name, model, tokenizer, prompts, args)
        row: dict[str, Any] = {"model": name}
        lengths = list(map(token_count, answers))
        scores = {f"judge/{gold.name}": (gold.score(prompts, answers, columns), lengths) for gold in judges}
        for prefix, (own, _) in scores.items():
            row |= named(f"{prefix}/score", *bootstrap_interval(own))
        if args.oracle == "world":
            from ..world.oracle import judge

            metrics, judgements = oracle_metrics(prompts, [answer.text for answer in answers], groups, judge)
            row |= metrics
            for sample, judgement in zip(samples, judgements, strict=True):
                sample[f"{name}_correct"] = judgement.correct
            new = [at for at, group in enumerate(groups) if group == NEW_COMBINATIONS]
            if new:
                scores["oracle"] = [judgements[at].score for at in new], [token_count(answers[at]) for at in new]
        if all(map(rows[0].get, CHECKED)):
            from ..constraints.checks import strict_figures

            row |= strict_figures(rows, [answer.text for answer in answers])
        row |= answer_metrics(model, models["sft"], tokenizer, prompts, answers, args.temperature)
        row |= win_metrics(scores, before)
        before = scores
        if reward_model is not None:
            row["reward_score"] = sum(score_completions(reward_model, tokenizer, prompts, answers)) / len(answers)
        if texts:
            row["bits_per_byte"] = document_bits_per_byte(model, tokenizer, texts)
        for sample, answer in zip(samples, answers, strict=True):
            sample[name] = answer.text
        comparison.append(row)
    return comparison, samples


def sample_answers(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    args: EvaluateArguments,
) -> list[Completion]:
    """Return the model's answer to each prompt; a progress bar has its name."""
    completions = sample_completions(
        model,
        tokenizer,
        prompts,
        args.max_new_tokens,
        args.temperature,
        batch_size=args.batch_size,
        seed=args.seed,
        description=name,
    )
    return [answer for (answer,) in completions]


def win_metrics(scores: dict[str, Scores], before: dict[str, Scores]) -> dict[str, float]:
    """Return each judge's win rates over the model before, if there is one, by prefix."""
    return {
        f"{prefix}/{key}": value
        for prefix, (own, lengths) in scores.items()
        if prefix in before
        for key, value in win_rates(own, before[prefix][0], lengths, before[prefix][1]).items()
    }


def answer_metrics(
    model: "PreTrainedModel",
    reference: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
    temperature: float,
) -> dict[str, float]:
    """Return what a collapse shows in: length, endings, variety, sameness, repetition, KL and entropy of answers.

    `kl_to_sft` is KL(model || reference) in nats per answer, from the samples (k1 estimator), and the entropy the mean
    of -log p over their tokens, both of the distributions at the sampling temperature. Greedy answers have no entropy.
    """
    encoded = encode_prompts(tokenizer, prompts)
    tokens = sum(map(token_count, answers))
    metrics = {
        "response_tokens": tokens / len(answers),
        "stopped_share": sum(answer.stopped for answer in answers) / len(answers),
        **answer_figures(list(map(tuple, encoded)), [answer.token_ids for answer in answers]),
    }
    rows = [ids + list(answer.token_ids) for ids, answer in zip(encoded, answers, strict=True)]
    starts = list(map(len, encoded))
    own = sum(log_probs(model, rows, starts, temperature=temperature or 1.0))
    other = own if model is reference else sum(log_probs(reference, rows, starts, temperature=temperature or 1.0))
    metrics["kl_to_sft"] = (own - other) / len(rows)
    return metrics | ({"entropy_per_token": -own / tokens} if temperature and tokens else {})


def token_count(answer: Completion) -> int:
    """Return the number of an answer's tokens, with the stop token."""
    return len(answer.token_ids)


def fitting_prompts(
    rows: Sequence[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", args: EvaluateArguments
) -> list[dict[str, Any]]:
    """Return the first `max_prompts` rows whose prompt has at most `max_prompt_tokens` tokens.

    Raises:
        UserError: if none is left.
    """
    lengths = map(len, encode_prompts(tokenizer, [row["prompt"] for row in rows]))
    limit = args.max_prompt_tokens
    fitting = [row for row, length in zip(rows, lengths, strict=True) if limit is None or length <= limit]
    if not fitting:
        raise UserError(f"max_prompt_tokens: all {len(rows):,} prompts are longer than {limit} tokens; raise it")
    if len(fitting) < len(rows):
        logger.warning(
            "%d of %d prompts are longer than %d tokens and are left out", len(rows) - len(fitting), len(rows), limit
        )
    return fitting[: args.max_prompts]


@torch.no_grad()
def log_probs(
    model: "PreTrainedModel",
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_tokens: int = 16_384,
    temperature: float = 1.0,
) -> list[float]:
    """Return the sum of log p(token | tokens before) in nats over `row[start:]`, for each row of token ids.

    Args:
        batch_tokens: tokens that are read at once, padding included. Each takes a row of logits, as wide as the
            vocabulary.
    """
    sums = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        width = len(rows[order[0]])
        batch, order = order[: (count := max(batch_tokens // max(width, 1), 1))], order[count:]
        ids = torch.tensor(
            [list(rows[index]) + [0] * (width - len(rows[index])) for index in batch], device=model.device
        )
        # Right padding needs no mask: attention is causal and padded positions are not read.
        logits = model(input_ids=ids).logits[:, :-1].float() / temperature
        token_log_probs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for row, index in enumerate(batch):
            sums[index] = token_log_probs[row, max(starts[index] - 1, 0) : len(rows[index]) - 1].sum().item()
    return sums


def windows(ids: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yield slices of at most `size` tokens, and the index in each of the first token that is new.

    The first slice is new but for its first token; of each later one the first half is context.
    """
    yield ids[:size], 1
    step = max(size // 2, 1)
    for at in range(size, len(ids), step):
        yield ids[at - (size - step) : at + step], size - step


def document_bits_per_byte(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], window_tokens: int = 512
) -> float:
    """Return bits per UTF-8 byte of whole documents with their end token; long ones are read in windows."""
    window_tokens = min(window_tokens, positions_of(model.config) or window_tokens)
    end = document_end(tokenizer)
    # A document without a token of its own at its start follows the end of another one, as in pretraining.
    start = document_start(tokenizer) or [end]
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    read = [window for ids in encoded for window in windows([*start, *ids, end], window_tokens)]
    rows, starts = zip(*read, strict=True)
    nats = -sum(log_probs(model, rows, starts))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def pseudo_log_probs(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]]
) -> list[float]:
    """Return the pseudo-log-likelihood of each row in nats.

    Every token is masked in turn (Salazar et al. 2020, arXiv 1910.14659).
    """
    special = set(tokenizer.all_special_ids)
    places = [(index, at) for index, row in enumerate(rows) for at, token in enumerate(row) if token not in special]
    sums = [0.0] * len(rows)
    places.sort(key=lambda place: len(rows[place[0]]))
    for batch in batched(places, 256):
        hidden = [[*rows[index][:at], tokenizer.mask_token_id, *rows[index][at + 1 :]] for index, at in batch]
        ids, mask = (tensor.to(model.device) for tensor in pad_rows(hidden, "right"))
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, (index, at) in enumerate(batch):
            sums[index] += logits[row, at].float().log_softmax(-1)[rows[index][at]].item()
    return sums


def load_masked(path: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a masked language model and its tokenizer for [`pseudo_log_probs`].

    Raises:
        UserError: if it is none, or if its tokenizer has no mask token or more tokens than the model.
    """
    tokenizer, model = load_tokenizer(path), load_masked_lm(path)
    if tokenizer.mask_token_id is None:
        raise UserError(f"{path}: masked_model: no mask token; name a model trained with objective: mlm")
    check_vocabulary(model.config, tokenizer, path)
    return model, tokenizer


def minimal_pair_accuracy(
    rows: Sequence[dict[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    score: Callable[[list[list[int]]], list[float]],
) -> dict[str, float]:
    """Return, for each skill, the share of pairs whose right text scores higher.

    Args:
        rows: pairs with `skill`, `good` and `bad`.
        score: a function from token rows to log-likelihoods.
    """
    encoded = [tokenizer(row[side], add_special_tokens=False)["input_ids"] for row in rows for side in ("good", "bad")]
    end = document_end(tokenizer)
    scores = score([[*(document_start(tokenizer) or [end]), *ids, end] for ids in encoded])
    right = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    skills = dict.fromkeys(row["skill"] for row in rows)
    return {
        skill: sum(ok for ok, row in zip(right, rows, strict=True) if row["skill"] == skill)
        / sum(row["skill"] == skill for row in rows)
        for skill in skills
    }
