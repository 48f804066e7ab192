"""Reward functions that a recipe names, `reward_funcs: [module:function]`, beside or instead of a reward model."""

import json

import pytest
from helpers.scripts import run_script
from helpers.tiny_ppo import make_policy, make_tokenizer

from sandan.core.errors import UserError
from sandan.ppo.reward_functions import named_function


def needs_more(prompts, completions, wanted):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:score", "No module named"),
        (f"{__name__}:missing", "missing"),
        (f"{__name__}:needs_more", "needs wanted, but the training data has the columns prompt"),
        ("needs_more", "expected module:function"),
    ],
)
def test_a_name_that_gives_no_reward_is_one_line(name, says):
    with pytest.raises(UserError, match=f"^reward_funcs: {name}: .*{says}") as caught:
        named_function(name, ["prompt"], "reward_funcs")
    assert "\n" not in str(caught.value)


def test_a_module_of_the_users_own_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("raise RuntimeError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    says = "reward_funcs: my_rewards:score: RuntimeError: not today; expected module:function"
    with pytest.raises(UserError, match=says):
        named_function("my_rewards:score", ["prompt"], "reward_funcs")


def test_what_a_module_says_is_missing_stays_as_it_is(tmp_path, monkeypatch):
    text = "from sandan.core.errors import UserError\nraise UserError('a package is missing; install it: pip install it')\n"
    (tmp_path / "needs_a_package.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="^a package is missing; install it: pip install it$"):
        named_function("needs_a_package:score", ["prompt"], "reward_funcs")


@pytest.mark.slow
def test_ppo_trains_on_functions_without_a_reward_model(tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    rows = [{"prompt": f"w{number} w{number + 1}"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ppo.yaml").write_text(
        "model_name_or_path: policy\ndata_files: [prompts.jsonl]\nheld_out_share: 0.3\noutput_dir: out/ppo\n"
        "reward_funcs: ['helpers.tiny_ppo:share_of_w5']\n"
        "use_cpu: true\nbf16: false\ntotal_episodes: 8\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 1\n"
        "num_ppo_epochs: 1\nresponse_length: 4\nsave_strategy: 'no'\nreport_to: none\n"
    )
    done = run_script("ppo", "--config", "ppo.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/ppo/result.json").read_text())["metrics"]
    assert metrics["updates"] == 2 and 0 <= metrics["eval_rewards/share_of_w5"] <= 1
    arguments = [
        "--model_name_or_path",
        "policy",
        "--data_files",
        "prompts.jsonl",
        "--output_dir",
        "out/no",
        "--use_cpu",
        "true",
    ]
    neither = run_script("ppo", *arguments, cwd=tmp_path)
    assert neither.returncode == 2 and "reward_model_path" in neither.stderr.splitlines()[-1]
