"""The command line of `sandan`, as far as it is not that of a stage's script."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from .._version import __version__
from ..core.chain import STAGES


COMMANDS = {
    "demo": "Run the chain of the recipe tiny: a small model from nothing, on the embedded data",
    "chain": "Run every stage of a recipe, each only if something before it changed",
    **{row.name: row.help for row in STAGES.values()},
    "init": "Copy a recipe to recipes/NAME, to edit it",
    "recipes": "List the recipes",
    "check": "Check a recipe without training: settings, data, tokens, steps, memory, disk",
    "chat": "Talk to the models of a recipe side by side, in the browser or (--text) in the terminal, and vote",
    "push": "Push the results of a recipe to the Hub, private: sandan push --hub_id alice/tiny",
    "completion": "Print the completion script of a shell",
}
EPILOG = """Other options of a stage are those of its script (sandan sft --help) and replace what the recipe says:
  sandan sft --recipe tiny --learning_rate 1e-3"""


def make_parser() -> ArgumentParser:
    """Return the parser; options that it does not know are for a stage's script."""
    parser = ArgumentParser(
        "sandan",
        description="Pre-training, fine-tuning and RLHF of a language model, on Hugging Face libraries.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sandan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        has_script = name in STAGES or name in ("chat", "push")
        command = commands.add_parser(
            name, help=summary, description=f"{summary}.", allow_abbrev=False, add_help=not has_script
        )
        if has_script:
            # Not argparse's own `--help`, which would leave out the options of the script.
            command.set_defaults(own_help=command.format_help)
            command.add_argument("-h", "--help", action="store_true", dest="help", help="show this and exit")
            command.add_argument("--help_all", action="store_true", help="show every option of the script, too")
        add_options(command, name)
    return parser


def add_options(command: ArgumentParser, name: str) -> None:
    """Add the options of one command."""
    runs_stages = name in STAGES or name in ("chain", "demo")
    if name == "init":
        command.add_argument("name", metavar="NAME", help="of the new recipe")
    if name == "completion":
        command.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    if name == "demo":
        command.set_defaults(recipe="tiny")
    elif name not in ("recipes", "completion"):
        command.add_argument("--recipe", default="tiny", metavar="RECIPE", help="name or folder (default: tiny)")
    if runs_stages:
        command.add_argument(
            "--launch",
            default="cpu",
            metavar="FILE",
            help="cpu, single_gpu, ddp, fsdp2, zero3, multi_node: a file of recipes/accelerate_configs/ (default: cpu)",
        )
    if name in ("chain", "demo"):
        command.add_argument("--seed", metavar="N", help="for every stage, which then all run again")
    if name == "chain":
        command.add_argument(
            "--until", choices=STAGES, metavar="STAGE", help="stop after it; options of its script may follow"
        )
    if name == "rank":
        command.add_argument("--annotator", metavar="NAME", help="who ranks, on a page in the browser")
    if runs_stages or name in ("check", "chat", "push"):
        command.add_argument("--plan", action="store_true", help="print the commands and run none")
