"""Cards of everything that is pushed. Every number in them comes from a `result.json` or an analysis, none from here."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from .._version import __version__
from ..core.chain import STAGES
from ..core.text import number, share


PPO_TEMPLATE = Path(__file__).parent / "templates" / "ppo_card.md.j2"
VERSIONED = ("TRL", "Transformers", "PEFT", "Torch", "Datasets", "Tokenizers")

TEMPLATE = """\
# {{ name }}

{{ description }}

Made by stage `{{ stage }}` of recipe `{{ recipe }}` with sandan {{ versions.sandan }}: \
pretraining, fine-tuning and RLHF in three steps.

## Measured
{% if metrics %}
| value | measured |
|---|--:|
{% for key, value in metrics.items() %}| `{{ key }}` | {{ value }} |
{% endfor %}
One run, seed {{ seed }}, {{ seconds }} s on {{ device }}. `result.json` has all values.
{% else %}
Nothing was measured.
{% endif %}
## Use

```python
{{ code }}
```

## Lineage

| input | sha256 |
|---|---|
{% for path, digest in inputs.items() %}| `{{ path }}` | `{{ digest }}` |
{% endfor %}
Versions: {% for key, value in versions.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}. \
`recipe.yaml` has every setting.

## Limits

The values above hold for the data of this recipe and say nothing about other data. The model was not examined for
harmful or wrong output on open input; a reward model's score is no measure of truth.
{% if not license %}
## Licence

None was chosen. Ask the owner before you use it, and look at the licences of the data above.
{% endif %}"""


def measured(stage: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's own metrics, and the metrics that the evaluation measured for its model."""
    metrics = dict(results[stage]["metrics"])
    prefix = STAGES[stage].evaluated_as
    if prefix and "evaluate" in results:
        ours = results["evaluate"]["metrics"].items()
        metrics |= {f"evaluate/{key}": value for key, value in ours if key.startswith(f"{prefix}/")}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in metrics.items()}


def model_card(repo_id: str, stage: str, results: Mapping[str, Any], license_name: str | None) -> str:
    """Return the README.md of a tokenizer or a model, with `model-index`.

    Args:
        results: each finished stage's `result.json`.
    """
    row = STAGES[stage]
    stem = repo_id.removesuffix(f"-{repo_id.rpartition('-')[2]}")
    metrics = measured(stage, results)
    data = ModelCardData(
        license=license_name,
        library_name="transformers",
        pipeline_tag=row.task,
        tags=["sandan", stage],
        base_model=f"{stem}-{STAGES[row.starts_from].repository}" if row.starts_from else None,
        datasets=[f"{stem}-preferences"] if stage in ("reward", "ppo") and "preferences" in results else None,
        model_name=repo_id.split("/")[1],
        eval_results=_eval_results(row.task, results[stage]["recipe"], metrics) if row.task else None,
    )
    name = "tokenizer" if row.auto_class == "AutoTokenizer" else "model"
    code = f'from transformers import {row.auto_class}\n\n{name} = {row.auto_class}.from_pretrained("{repo_id}")'
    return f"---\n{data.to_yaml()}\n---\n\n" + _body(repo_id, stage, results, license_name, metrics, code)


def _eval_results(task: str, recipe: str, metrics: Mapping[str, Any]) -> list[EvalResult] | None:
    """Return the held-out metrics for the card's `model-index`, or None without any."""
    shown = {name: value for name, value in metrics.items() if name.startswith(("eval", "best_of_n"))}
    dataset = {"dataset_type": recipe, "dataset_name": f"held-out data of recipe {recipe}"}
    return [
        EvalResult(task_type=task, metric_type=name, metric_name=name, metric_value=value, **dataset)
        for name, value in shown.items()
    ] or None


def _body(
    repo_id: str,
    stage: str,
    results: Mapping[str, Any],
    license_name: str | None,
    metrics: Mapping[str, Any],
    code: str,
) -> str:
    result = results[stage]
    template = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    return template.render(
        name=repo_id.split("/")[1],
        description=STAGES[stage].description,
        stage=stage,
        recipe=result["recipe"],
        metrics=metrics,
        seed=result["seed"],
        seconds=result["wall_seconds"],
        device=result["device"],
        inputs=result["inputs"],
        versions=result["versions"],
        code=code,
        license=license_name,
    )


def preference_card(
    splits: Mapping[str, Sequence[Any]],
    files: Mapping[str, str],
    analysis: Mapping[str, Any],
    licence: str,
    language: list[str],
) -> str:
    """Return the card of preference data: the annotators, their agreement, the guidelines and the licence.

    Args:
        splits: name -> pairs.
        files: name -> file of its pairs.
    """
    used = [name for name, rows in splits.items() if rows]
    names = {"train": "train", "eval": "test"}
    data = DatasetCardData(
        license=licence,
        language=language,
        task_categories=["reinforcement-learning"],
        tags=["preference", "rlhf", "trl", "sandan"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": names[name], "path": files[name]} for name in used],
            }
        ],
    )
    rows = [
        f"| {row['annotator']} | {row['kind']} | {row['judgements']:,} | {share(row['agreement'])} "
        f"| {share(row['self_consistency'])} | {'; '.join(row['remarks']) or '–'} |"
        for row in analysis["annotators"]
    ]
    guidelines = [f"- `{name}`: {count:,} judgements" for name, count in analysis["guidelines"].items()]
    body = [
        "# Preferences",
        f"{analysis['judgements']:,} rankings by {len(rows)} annotators, as pairs: "
        + ", ".join(f"{len(splits[name]):,} in `{names[name]}`" for name in used)
        + f". No prompt is in both. {analysis['tied_pairs']:,} tied pairs and "
        f"{analysis['skipped']:,} skipped items are left out.",
        (
            "`margin` is the difference of the two ranks. "
            "Columns: `prompt, chosen, rejected, margin, prompt_id, annotator`."
        ),
        "## Agreement",
        "\n".join(
            [
                f"- two annotators order a pair alike: {share(analysis['pairwise_agreement'])}",
                f"- Krippendorff's alpha (ordinal): {number(analysis['krippendorff_alpha'])}",
                f"- the same annotator, the item shown again: {share(analysis['self_consistency'])}",
                f"- the upper of two answers wins (0.5 without bias): {share(analysis['position_bias'])}",
            ]
        ),
        "## Annotators",
        "| annotator | kind | judgements | agrees with others | with themselves | remarks |\n"
        "|---|---|--:|--:|--:|---|\n" + "\n".join(rows),
        "## Guidelines",
        "\n".join(guidelines) or "None were recorded.",
    ]
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def ppo_card(
    base_model: str | None, dataset_name: str | None, model_name: str, tags: list[str], **fields: Any
) -> ModelCard:
    """Return the card that `PPOTrainer` writes, in the form of TRL's.

    Args:
        fields: what else the template shows.
    """
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            datasets=dataset_name,
            library_name="transformers",
            model_name=model_name,
            tags=tags,
        ),
        template_path=str(PPO_TEMPLATE),
        base_model=base_model,
        dataset_name=dataset_name,
        model_name=model_name,
        versions=[("sandan", __version__), *((name, metadata.version(name)) for name in VERSIONED)],
        **fields,
    )
