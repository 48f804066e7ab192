"""Push a recipe's results to the Hub: tokenizer, models and preference data, each with a card of its measurements.

    python scripts/push.py --recipe_dir outputs/tiny --hub_id alice/tiny

Public, with a licence:
    python scripts/push.py --recipe_dir outputs/tiny --hub_id alice/tiny --public true --license apache-2.0
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class PushArguments:
    """Settings of the push: the results, the repositories and the licence."""

    recipe_dir: str = field(metadata={"help": "Where the stage folders lie, e.g. outputs/tiny."})
    hub_id: str = field(metadata={"help": "OWNER/NAME; repositories are OWNER/NAME-base, -sft, -reward and so on."})
    public: bool = field(
        default=False, metadata={"help": "Make new repositories public; by default they are private."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of models and data, e.g. apache-2.0."})


def main(args):
    from pathlib import Path

    from huggingface_hub import HfApi

    from sandan.hub.push import check_rights, plan, push

    repositories = plan(Path(args.recipe_dir), args.hub_id, args.license)
    api = HfApi()
    for repository in repositories:
        check_rights(repository.repo_id, api)
    push(repositories, args.public, api, print)


if __name__ == "__main__":
    run(main, PushArguments, stage=False)
