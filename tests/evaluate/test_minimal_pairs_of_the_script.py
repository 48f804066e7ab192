"""Minimal pairs in `scripts/evaluate.py`, of the models that a recipe has."""

import runpy

from helpers import ROOT


PAIRS = [{"skill": "grammar", "good": "two cows", "bad": "two cow"}]


def test_a_masked_model_is_measured_without_a_base_model(tokenizer, monkeypatch):
    script = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))
    monkeypatch.setattr("sandan.evaluate.comparison.pseudo_log_probs", lambda model, own, rows: [1.0, 0.0])
    found = script["minimal_pairs"](PAIRS, tokenizer, None, ("model", tokenizer))
    assert found == {"minimal_pairs/mlm/grammar": 1.0}
    assert script["minimal_pairs"]([], tokenizer, None, None) == {}
