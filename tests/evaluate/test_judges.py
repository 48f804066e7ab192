"""Independent judges: which ones are refused, how functions are called, and what a comparison says of them."""

import json

import pytest
from helpers.tiny_ppo import make_classifier, make_policy, make_tokenizer

from sandan.core.errors import UserError
from sandan.evaluate.comparison import EvaluateArguments, compare
from sandan.evaluate.judges import Judge, function_judges, gold_judge, refuse_known_judge, reward_of
from sandan.evaluate.overoptimisation import TrueScoreArguments, keep_best_by


def words(prompts, completions, wanted):
    return [float(text.count(word)) for text, word in zip(completions, wanted, strict=True)]


def too_few(prompts, completions):
    return [0.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Reward models of recipes: PPO's own, a copy of its weights, one of the same pairs, and one of others."""
    root = tmp_path_factory.mktemp("judges")
    trained_on = {"own": "aa", "copy": "bb", "sibling": "aa", "gold": "cc"}
    for name, digest in trained_on.items():
        make_classifier(seed=1 if name in ("own", "copy") else len(name)).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        result = {"config": {"data_files": ["data/pairs.jsonl"]}, "inputs": {"data/pairs.jsonl": digest}}
        (root / name / "result.json").write_text(json.dumps(result))
    (root / "ppo").mkdir()
    (root / "ppo" / "result.json").write_text(json.dumps({"config": {"reward_model_path": str(root / "own")}}))
    return root


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ("own", "is the folder"),
        ("copy", "has the weights"),
        ("sibling", r"learned from training data \(pairs.jsonl\)"),
    ],
)
def test_a_judge_that_ppo_knows_is_refused(folders, gold, words):
    assert reward_of(str(folders / "ppo")) == str(folders / "own")
    for reward_models in ([None, str(folders / "own")], [str(folders / "own")] * 2):
        with pytest.raises(UserError, match=f"^gold_reward_model: .*{words} of .*own, .*train one on other pairs"):
            refuse_known_judge(str(folders / gold), reward_models)


@pytest.mark.parametrize(
    ("split", "is_refused"), [("train", True), ("train[:50%]", True), ("train[50%:]", False), ("test", False)]
)
def test_parts_of_a_data_set_of_the_hub_are_told_apart(tmp_path, split, is_refused):
    for name, part in (("own", "train[:50%]"), ("gold", split)):
        (tmp_path / name).mkdir()
        config = {"datasets": [{"path": "someone/pairs", "name": None, "split": part, "data_files": None}]}
        (tmp_path / name / "result.json").write_text(json.dumps({"config": config, "inputs": {}}))
    arguments = (str(tmp_path / "gold"), [str(tmp_path / "own")])
    if is_refused:
        with pytest.raises(UserError, match=r"learned from training data \(someone/pairs\)"):
            refuse_known_judge(*arguments)
    else:
        refuse_known_judge(*arguments)


def test_a_judge_of_other_pairs_is_taken(folders):
    refuse_known_judge(str(folders / "gold"), [str(folders / "own"), None])
    refuse_known_judge("someone/gold", ["someone/reward", reward_of("someone/ppo")])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:score", "No module named"),
        (f"{__name__}:missing", "missing"),
        (f"{__name__}:words", "needs wanted, but"),
        ("words", "expected module:function"),
    ],
)
def test_a_function_that_cannot_judge_is_one_line(name, says):
    with pytest.raises(UserError, match=f"^gold_functions: {name}: .*{says}") as caught:
        function_judges([name], ["prompt"])
    assert "\n" not in str(caught.value)


def test_two_judges_of_one_name_are_refused():
    with pytest.raises(UserError, match="another judge called too_few"):
        function_judges([f"{__name__}:too_few"] * 2, ["prompt"])


def test_a_comparison_measures_collapse_and_wins(folders):
    tokenizer, models = make_tokenizer(), {"base": make_policy(), "sft": make_policy()}
    models["ppo"] = models["sft"]
    rows = [{"prompt": f"w{n} w{n + 1}", "wanted": "w7"} for n in range(12)]
    judges = [Judge("w7", function_judges([f"{__name__}:words"], ["prompt", "wanted"])[0].score)]
    judges.append(gold_judge(str(folders / "gold"), tokenizer))
    args = EvaluateArguments("out", "sft", "ppo", base_model="base", max_new_tokens=6)
    (base, sft, ppo), samples = compare(models, tokenizer, rows, args, judges=judges)
    assert [row["ppo"] for row in samples] == [row["sft"] for row in samples]
    assert sft["judge/w7/score"] == pytest.approx(sum(row["sft"].count("w7") for row in samples) / 12)
    for name in ("w7", "gold"):
        assert ppo[f"judge/{name}/win_rate"] == ppo[f"judge/{name}/win_rate_low"] == 0.5, "twice the same answers"
        assert ppo[f"judge/{name}/win_rate_length_controlled"] == pytest.approx(0.5)
        assert f"judge/{name}/win_rate" not in base
    assert sft["kl_to_sft"] == ppo["kl_to_sft"] == 0.0
    assert 0 < sft["distinct_2"] <= 1 and 0 < sft["commonest_share"] < 0.5 and sft["repeated_share"] < 0.5
    assert 3.5 < sft["entropy_per_token"] < 4.7  # an untrained model: at most log 64 = 4.16, by samples
    assert (
        "entropy_per_token"
        not in compare(models, tokenizer, rows[:2], EvaluateArguments("o", "s", "p", temperature=0.0))[0][0]
    )


def test_scores_are_one_for_each_answer():
    (judge,) = function_judges([f"{__name__}:too_few"], ["prompt"])
    with pytest.raises(UserError, match="too_few: returned 1 scores for 2 answers"):
        judge.score(["a", "b"], compare_answers(2), {})


def compare_answers(count):
    from sandan.models.sampling import Completion

    return [Completion("w7", (10, 1), True)] * count


class Settings:
    load_best_model_at_end, metric_for_best_model, greater_is_better = True, "loss", False


def test_the_best_checkpoint_is_the_one_that_the_held_out_judge_likes():
    settings = Settings()
    keep_best_by(TrueScoreArguments("world"), settings)
    assert (settings.metric_for_best_model, settings.greater_is_better) == ("eval_rewards/true_score", True)
    with pytest.raises(UserError, match="^load_best_model_at_end: no judge says .*true_score"):
        keep_best_by(TrueScoreArguments(), Settings())
    settings.metric_for_best_model = "objective/scores"
    keep_best_by(TrueScoreArguments(), settings)
    assert settings.metric_for_best_model == "objective/scores"
