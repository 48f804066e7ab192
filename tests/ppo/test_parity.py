"""benchmarks/ppo_parity.py: how it judges differences, and (where TRL 1.12 is installed for it) what it finds."""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT


SCRIPT = ROOT / "benchmarks" / "ppo_parity.py"


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("ppo_parity", SCRIPT)
    module = sys.modules["ppo_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ppo_parity"]


def run(*arguments, timeout=600):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


def test_help_says_what_it_installs_and_prints():
    done = run("--help", timeout=30)
    assert done.returncode == 0, done.stderr
    for word in ("trl==1.12.0", "--env_dir", "--packages", "Exit code 1"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "ours, theirs, explained, verdict",
    [
        ([1.0, 2.0], [1.0, 2.0], {}, "agrees"),
        ([1.0, 2.0], [1.0, 2.00002], {}, "agrees"),  # 1e-5 of the largest value
        ([1.0, 2.0], [1.0, 2.0001], {}, "UNEXPLAINED"),
        ([1.0, 2.0], [1.0, 2.0001], {"T16": ("x",)}, "T16"),
        ([1.0, 2.0], [1.0, 2.0001], {"T16": ("another",)}, "UNEXPLAINED"),
        ([1.0, 2.0], [1.0, 2.0], {"T16": ("x",)}, "NOT SHOWN"),
        ([0.0], [math.nan], {}, "UNEXPLAINED"),
        ([0.0], [math.nan], {"T11": ("x",)}, "T11"),
    ],
)
def test_verdicts(parity, ours, theirs, explained, verdict):
    (row,) = parity.compare({"x": torch.tensor(ours)}, {"x": torch.tensor(theirs)}, explained).values()
    assert row["verdict"] == verdict
    assert parity.passed({"x": row}) is (verdict in ("agrees", "T16", "T11"))
    json.dumps(row, allow_nan=False)


def test_what_sandan_lacks_is_missing_and_pace_is_not_compared(parity):
    rows = parity.compare({"more": torch.ones(1)}, {"x": torch.ones(1), "log eps": torch.ones(1)}, {})
    assert {name: row["verdict"] for name, row in rows.items()} == {"x": "MISSING"}
    assert not parity.passed(rows)


def test_cases_are_reproducible_and_are_what_they_are_called(parity):
    for name, case in parity.CASES.items():
        described = case.describe()
        assert json.loads(json.dumps(described)) == case.describe(), name
        width, stop = described["settings"]["response_length"], described["settings"].get("stop_token_id", 1)
        answers = list(described["answers"].values())
        assert len(answers) == len(described["prompts"]) == case.rows
        assert all(0 < len(tokens) <= width for tokens in answers)
        # The stop token ends an answer, and whatever has not the full length ends in it.
        assert all(stop not in tokens[:-1] for tokens in answers)
        assert all(tokens[-1] == stop for tokens in answers if len(tokens) < width)
        assert (max(map(len, answers)) < width) is (case.answers == "early")
        assert (min(map(len, answers)) == width) is (case.answers == "full")


def test_explanations_are_known_and_unambiguous(parity):
    for name, case in parity.CASES.items():
        assert set(case.explained) <= set(parity.EXPLANATIONS), name
        quantities = [quantity for group in case.explained.values() for quantity in group]
        assert len(quantities) == len(set(quantities)), name


def test_an_environment_for_other_packages_is_not_reused(parity, tmp_path):
    (tmp_path / "packages.json").write_text("{}")
    with pytest.raises(SystemExit, match="give another --env_dir"):
        parity.make_environment(tmp_path, [])


# ---- docs/ppo.md names nothing that does not exist ----


def documented(pattern):
    """Names in backticks of the document that match as a whole."""
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    return {name for name in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, name)}


def test_documented_tests_exist():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(documented(r"test_\w+")) > 40
    assert documented(r"test_\w+") <= defined


def test_documented_functions_exist():
    rooms = [ROOT / "src" / "sandan" / room for room in ("ppo", "models", "reward", "training")]
    ours = {path.stem for room in rooms for path in room.glob("*.py")}
    names = documented(rf"({'|'.join(sorted(ours))})\.(?!json)\w+(\.\w+)*")
    assert len(names) > 50
    for name in names:
        module, *path = name.split(".")
        files = [room / f"{module}.py" for room in rooms if (room / f"{module}.py").is_file()]
        found = [importlib.import_module(f"sandan.{file.parent.name}.{module}") for file in files]
        assert any(has_path(owner, path) for owner in found), name


def has_path(owner, path):
    for name in path:
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def test_documented_settings_and_metrics_exist():
    from sandan import PPOConfig

    settings = {one.name for one in dataclasses.fields(PPOConfig)}
    given = {name.partition("=")[0] for name in documented(r"[a-z_0-9]+=[^=]+")} - {"reward_funcs", "ref_model"}
    assert given - {"value_model"} <= settings | {"dataset_name", "resume_from_checkpoint"}
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "sandan" / "ppo").glob("*.py"))
    metrics = documented(r"(objective|policy|loss|val|time|sampling)/[\w/]+")
    assert len(metrics) > 25
    assert all(f'"{name}"' in source for name in metrics)


def test_every_setting_beyond_trl_is_documented():
    from transformers import TrainingArguments

    from sandan import PPOConfig

    own = {one.name for one in dataclasses.fields(PPOConfig)} - {
        one.name for one in dataclasses.fields(TrainingArguments)
    }
    trl = set(
        re.findall(
            r"\w+",
            """dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations
            response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size
            num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
            reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator
            cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation""",
        )
    )
    beyond = {name for name in own - trl if not name.startswith("vllm_")}
    assert trl <= own
    assert len(beyond) > 15
    assert beyond <= documented(r"\w+")


@pytest.mark.slow
def test_parity_with_trl(parity, tmp_path):
    if not (parity.DEFAULT_ENV_DIR / "packages.json").exists():
        pytest.skip(f"TRL 1.12 is not installed: run `python {SCRIPT.relative_to(ROOT)}` once")
    done = run("--output", tmp_path / "parity.json")
    result = json.loads((tmp_path / "parity.json").read_text())
    assert done.returncode == 0, {
        (case, name): row
        for case, quantities in result["cases"].items()
        for name, row in quantities.items()
        if row["verdict"] not in ("agrees", *parity.EXPLANATIONS)
    }
    assert result["verdict"] == "parity"
    assert result["versions"]["trl"]["trl"] == "1.12.0"
    assert result["versions"]["sandan"]["trl"] != "1.12.0"
    agreed = {name for name, row in result["cases"]["one micro-batch"].items() if row["verdict"] == "agrees"}
    assert agreed >= {
        "log-probs",
        "reference log-probs",
        "values",
        "scores",
        "token rewards",
        "advantages",
        "returns",
        "policy loss, first step",
        "value loss, first step",
        "first gradient",
        "weights after the update",
    }
