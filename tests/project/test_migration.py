"""docs/migration.md: its blocks are run as a reader would have them after the change, and what it names exists."""

import re
import runpy
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from helpers import ROOT
from helpers.tiny_ppo import make_classifier, make_policy, make_tokenizer

from sandan import PPOConfig


TEXT = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def blocks():
    """(heading, block) of every diff of the page."""
    for section in TEXT.split("\n## ")[1:]:
        heading = section.splitlines()[0]
        for block in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            yield heading, block


def changed(block):
    """The code after the change: lines that stay or are new, without their mark."""
    assert all(line[:1] in "+- " for line in block.splitlines())
    return "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))


def test_every_block_is_a_diff():
    assert set(re.findall(r"^```(\w+)$", TEXT, re.MULTILINE)) == {"diff"}
    assert [heading for heading, _ in blocks()] == [
        "TRL 0.13 and newer",
        "TRL 0.12",
        *["TRL 0.11 and older"] * 2,
        "OpenRLHF",
    ]


@pytest.mark.parametrize(("heading", "block"), list(blocks()))
def test_a_block_runs_after_the_change(tmp_path, monkeypatch, heading, block):
    monkeypatch.chdir(tmp_path)
    make_policy().save_pretrained("my-sft-model")
    rows = {"input_ids": [[3 + row, 4, 5] for row in range(8)]}
    texts = Dataset.from_dict(rows | {"query": [f"w{row} w1 w2" for row in range(8)]})
    names = {
        "torch": torch,
        "model": make_policy(),
        "ref_model": make_policy(),
        "reward_model": make_classifier(),
        "value_model": make_classifier(2),
        "tokenizer": make_tokenizer(),
        "train_dataset": Dataset.from_dict(rows),
        "eval_dataset": Dataset.from_dict(rows),
        "dataset": texts.with_format("torch"),
        "collator": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
        "judge": lambda answers: [float(len(answer)) for answer in answers],
    }
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "script.py").write_text(changed(block), encoding="utf-8")
    runpy.run_path("script.py", names)
    assert (tmp_path / "output").exists() or "sandan.legacy" not in block


def section(name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", TEXT, re.DOTALL)[1]


def test_settings_that_the_page_names_exist():
    known = {field.name for field in fields(PPOConfig)} | {"model", "reward_funcs", "value_model", "train_dataset"}
    for row in section("openrlhf").splitlines()[2:]:
        _, theirs, ours, _ = row.split("|")
        assert re.findall(r"`--\w+`", theirs)
        assert set(re.findall(r"`(\w+)`", ours)) <= known | {"prompt"}


def test_tests_that_the_page_names_exist():
    there = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "legacy").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)` \|$", section("legacy"), re.MULTILINE)
    assert len(named) == len(section("legacy").splitlines()) - 2
    assert all(f"def {name}(" in there for name in named)
