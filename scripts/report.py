"""Put the results of all stages into one page, one JSON file and one table, and check that every stage helped.

    python scripts/report.py --config recipes/tiny/report.yaml

Results in another folder:
    python scripts/report.py --config recipes/tiny/report.yaml --recipe_dir DIR --output_dir DIR/report

Exit code 0 if every check passed, 1 if one did not; the files are written either way.
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class ReportArguments:
    """Settings of the report: the folders of the results and of the report."""

    output_dir: str = field(metadata={"help": "Folder of report.html, report.json and result.json."})
    recipe_dir: str = field(metadata={"help": "Where the stage folders lie, e.g. outputs/tiny."})
    seed: int = field(default=0, metadata={"help": "Recorded in result.json; nothing here is random."})


def main(args, stage):
    from pathlib import Path

    from sandan.core.errors import GateError
    from sandan.report.build import write_report

    report = write_report(Path(args.recipe_dir), stage)
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    stage.finish({"passed": report["passed"], "checks": len(report["checks"]), "checks_failed": len(failed)})
    if not report["passed"]:
        reason = f"failed checks: {', '.join(failed)}" if failed else "nothing could be checked"
        raise GateError(f"{stage.output_dir}/report.json: {reason}")


if __name__ == "__main__":
    run(main, ReportArguments)
