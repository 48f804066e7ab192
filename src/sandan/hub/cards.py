"""Model cards. Every number in them comes from the `result.json` that the stage wrote."""

from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from ..core.chain import STAGES


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


def _front(values: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if value is not None}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n\n"


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
    front = {
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": row.task,
        "tags": ["sandan", stage],
        "base_model": f"{stem}-{STAGES[row.starts_from].repository}" if row.starts_from else None,
        "datasets": [f"{stem}-preferences"] if stage in ("reward", "ppo") and "preferences" in results else None,
        "model-index": _model_index(repo_id, row.task, results[stage]["recipe"], metrics) if row.task else None,
    }
    name = "tokenizer" if row.auto_class == "AutoTokenizer" else "model"
    code = f'from transformers import {row.auto_class}\n\n{name} = {row.auto_class}.from_pretrained("{repo_id}")'
    return _front(front) + _body(repo_id, stage, results, license_name, metrics, code)


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


def _model_index(repo_id: str, task: str, recipe: str, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return results in the Hub's form (`huggingface_hub.EvalResult` writes the same, one metric at a time)."""
    shown = {key: value for key, value in metrics.items() if key.startswith(("eval", "best_of_n"))}
    if not shown:
        return None
    values = [{"type": key, "name": key, "value": value} for key, value in shown.items()]
    dataset = {"name": f"held-out data of recipe {recipe}", "type": recipe}
    return [
        {"name": repo_id.split("/")[1], "results": [{"task": {"type": task}, "dataset": dataset, "metrics": values}]}
    ]
