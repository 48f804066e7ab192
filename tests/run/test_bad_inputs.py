"""The table of bad inputs in docs/bad_inputs.md is what the scripts say."""

import pytest
from helpers import ROOT, bad_inputs


CASES = [(area, case) for area, cases in bad_inputs.CASES.items() for case in cases]
TABLE = (ROOT / "docs" / "bad_inputs.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return bad_inputs.Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("area, case", CASES, ids=[f"{area}-{case.what[:40]}" for area, case in CASES])
def test_bad_input_gets_its_line(bench, area, case):
    line = bad_inputs.escaped(bench.refusal(case))
    if bad_inputs.versions() in TABLE:
        stage = "" if case.stage == "sft" else f" ({case.stage})"
        assert f"| {case.what}{stage} | {line} |" in TABLE.splitlines()


def test_the_table_has_at_least_100_cases():
    assert len(CASES) >= 100
    assert sum(line.startswith("| ") and not line.startswith("| input") for line in TABLE.splitlines()) == len(CASES)
