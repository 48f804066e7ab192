"""The report of a recipe: `report.json`, one self-contained `report.html` and a table for the terminal.

All three are made from the same result files of the stages, so they cannot disagree.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.chain import CHAIN
from ..core.errors import UserError
from ..core.files import write_text
from ..core.places import command_for
from ..core.stage import RESULT, Stage, read_result
from ..data.jsonl import read_jsonl
from ..ppo.diagnosis import findings, is_long_enough
from .checks import lineage_check, run_checks, seeds_remark, stale_inputs
from .figures import finite
from .page import render_html
from .terminal import render_table


logger = logging.getLogger(__name__)


def write_report(recipe_dir: Path, stage: Stage) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the stage's folder and log the table.

    Args:
        recipe_dir: the folder of the stage folders, e.g. `outputs/tiny`.
        stage: the report stage; every other stage's result becomes one of its inputs.

    Returns:
        `dict`: the content of `report.json`.

    Raises:
        UserError: if the evaluation has not been run, or a file is not valid JSON.
    """
    folder = recipe_dir / "evaluate"
    read_result(folder)
    comparison = _read_json(folder / "comparison.json")
    samples_path = folder / "samples.jsonl"
    samples = read_jsonl(samples_path) if samples_path.is_file() and samples_path.stat().st_size else []
    names = [name for name in CHAIN if name != "report" and (recipe_dir / name / RESULT).is_file()]
    results = {name: read_result(recipe_dir / name) for name in names}
    for name in names:
        stage.add_input(recipe_dir / name)
    logs = {name: recipe_dir / name / "trainer_state.json" for name in names}
    histories = {name: _read_json(path)["log_history"] for name, path in logs.items() if path.is_file()}

    details = {
        (name, file): _read_json(recipe_dir / name / file)
        for name, file in (("preferences", "agreement.json"), ("reward", "diagnostics.json"))
        if (recipe_dir / name / file).is_file()
    }
    report = build_report(stage.recipe, results, comparison, recipe_dir, histories.get("ppo", []), samples)
    text = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    page, table = render_html(report, histories, samples, details), render_table(report, samples)
    written = stage.begin_writing()
    write_text(written / "report.json", text + "\n")
    write_text(written / "report.html", page)
    logger.info("%s\nreport: %s", table, written / "report.html")
    return report


def build_report(
    recipe: str,
    results: dict[str, dict[str, Any]],
    comparison: list[dict[str, Any]],
    recipe_dir: Path,
    ppo_history: Sequence[dict[str, Any]] = (),
    samples: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the content of `report.json`, from each stage's `result.json` and the evaluation's comparison.

    Args:
        recipe: name of the recipe.
        results: stage -> its `result.json`.
        comparison: one row per model.
        recipe_dir: the folder of the stage folders.
        ppo_history: the log history of PPO. `watch` lists the findings in it, or is None if it is too short.
        samples: prompts with each model's answer.
    """
    kept = ("metrics", "wall_seconds", "device", "seed", "finished")
    lineage = {name: result["inputs"] for name, result in results.items()}
    stale = stale_inputs(lineage, recipe_dir)
    metrics = {name: result["metrics"] for name, result in results.items()}
    max_kl_nats = results.get("ppo", {}).get("config", {}).get("max_kl_nats")
    measured = run_checks(metrics, comparison, samples, max_kl_nats)
    # An intact lineage alone says nothing about the models, so at least one check must have been measured.
    passed = bool(measured) and all(check["passed"] for check in measured) and not any(stale.values())
    versions: dict[str, list[str]] = {}
    for result in results.values():
        for package, version in result["versions"].items():
            versions[package] = sorted({*versions.get(package, []), version})
    return {
        "recipe": recipe,
        "passed": passed,
        "checks": measured + lineage_check(lineage, stale),
        "stages": {name: {key: result[key] for key in kept} for name, result in results.items()},
        "remarks": [*filter(None, [seeds_remark(results)])],
        "comparison": comparison,
        "watch": [dataclasses.asdict(finding) for finding in findings(ppo_history, max_kl_nats)]
        if is_long_enough(ppo_history)
        else None,
        "versions": {package: ", ".join(found) for package, found in versions.items()},
        "lineage": lineage,
        "stale": stale,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        again = command_for(path.parent.name, path.parent.parent.name)
        raise UserError(f"{path}: not there; run `{again}` again") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); run that stage again") from None
