"""The checks that a recipe must pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import sha256
from ..core.stage import RESULT
from .collapse_checks import collapse_checks, judge_checks
from .figures import MODELS, is_number, judges_of


def run_checks(
    metrics: dict[str, dict[str, Any]],
    comparison: list[dict[str, Any]],
    samples: Sequence[Mapping[str, Any]] = (),
    max_kl_nats: float | None = None,
) -> list[dict[str, Any]]:
    """Run the checks that a recipe must pass. A check whose figures are missing is not listed.

    Whether PPO is above SFT is said by a judge that training never saw; where there is none, that check fails.

    Args:
        metrics: stage -> its metrics.
        comparison: one row per model.
        samples: prompts with each model's answer, for examples.
        max_kl_nats: PPO's budget of the KL to SFT, in nats per answer.

    Returns:
        `list[dict]`: `name`, `passed` and `detail` (the figures) of each check.
    """
    rows = {row["model"]: row for row in comparison}
    base, sft, ppo = (rows.get(model, {}) for model in MODELS)
    reward, pretrain, tuned = (metrics.get(name, {}) for name in ("reward", "pretrain", "sft"))
    checks: list[dict[str, Any]] = []

    def check(name: str, low: Any, high: Any, detail: str) -> None:
        if is_number(low) and is_number(high):
            detail = detail.format(low=f"{low:.3g}", high=f"{high:.3g}", sign="<" if low < high else "≥")
            checks.append({"name": name, "passed": low < high, "detail": detail})

    if any(is_number(row.get("oracle/score")) for row in comparison):
        detail = "oracle score, 95% intervals: {0} at most {{low}} {{sign}} {1} at least {{high}}"
        ends = base.get("oracle/score_high"), sft.get("oracle/score_low")
        check("SFT above base", *ends, detail.format("base", "SFT"))
        ends = sft.get("oracle/score_high"), ppo.get("oracle/score_low")
        check("PPO above SFT", *ends, detail.format("SFT", "PPO"))
        detail = "oracle score of the reward model's choice: one answer {low} {sign} best of eight {high}"
        check("best of 8 above best of 1", reward.get("best_of_n/1"), reward.get("best_of_n/8"), detail)
    else:
        detail = "loss on unseen rows: after {low} {sign} before {high}"
        check("SFT lowers the loss", tuned.get("eval_loss"), tuned.get("eval_loss_before"), detail)
        detail = "accuracy on unseen pairs: chance {low} {sign} at least {high} (95% interval)"
        check("reward model above chance", 0.5, reward.get("eval_accuracy_low"), detail)
    detail = "bits per byte of unseen text: trained {low} {sign} untrained {high}"
    ends = pretrain.get("eval_bits_per_byte"), pretrain.get("untrained_bits_per_byte")
    check("pre-training learned", *ends, detail)
    by_oracle = any(listed["name"] == "PPO above SFT" for listed in checks)
    if not by_oracle or judges_of([ppo]):
        name = "PPO above SFT by other judges" if by_oracle else "PPO above SFT"
        checks += [judged | {"name": name} for judged in judge_checks(sft, ppo)]
    return checks + collapse_checks(sft, ppo, samples, max_kl_nats)


def stale_inputs(lineage: dict[str, dict[str, str]], recipe_dir: Path) -> dict[str, list[str]]:
    """Return, for each stage, its inputs that are an earlier stage's `result.json` and have changed or disappeared."""
    return {
        name: [
            path
            for path, digest in inputs.items()
            if Path(path).name == RESULT and not _is_unchanged(Path(path), digest, recipe_dir)
        ]
        for name, inputs in lineage.items()
    }


def _is_unchanged(path: Path, digest: str, recipe_dir: Path) -> bool:
    # Paths are recorded relative to the folder in which the stage ran; the recipe's folder may have moved since.
    if path.parent.parent.name == recipe_dir.resolve().name:
        path = recipe_dir / path.parent.name / RESULT
    return path.is_file() and sha256(path) == digest


def lineage_check(lineage: dict[str, dict[str, str]], stale: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Check that every stage used the present results of earlier stages; the list is empty if no stage used any."""
    count = sum(Path(path).name == RESULT for inputs in lineage.values() for path in inputs)
    if not count:
        return []
    changed = [f"{name} used another version of {path}" for name, paths in stale.items() for path in paths]
    detail = "; ".join(changed) if changed else f"sha256 of all {count} results of earlier stages unchanged"
    return [{"name": "lineage", "passed": not changed, "detail": detail}]


def seeds_remark(results: dict[str, dict[str, Any]]) -> str | None:
    """Return a sentence about stages that ran with different seeds; None if they are those of one run.

    Stages that train are compared among themselves, and the others too: where no seed is given, transformers takes 42
    and our own stages take 0.

    Args:
        results: stage -> its `result.json`.
    """
    stages: dict[tuple[bool, Any], list[str]] = {}
    for name, result in results.items():
        stages.setdefault(("learning_rate" in result["config"], result["seed"]), []).append(name)
    if len(stages) == len({trains for trains, _ in stages}):
        return None
    found = "; ".join(f"seed {seed}: {', '.join(names)}" for (_, seed), names in stages.items())
    return f"The stages ran with different seeds, so these figures are not those of one run ({found})."
