"""The stages of the chain, one row each, with names, inputs, results and Hub repository.

A new stage is a row here, a script (`scripts/<name>.py`) and a recipe file (`recipes/<recipe>/<name>.yaml`). The
Makefile reads the names by running this file before anything is installed, so it imports only the standard library.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class StageRow:
    """A stage of the chain.

    Args:
        name: of its recipe file, its output folder and its make target.
        title: in the report.
        help: the line of `make help`.
        needs: the earlier stages whose results it reads.
        script: the stem of its file in `scripts/`, where that is not `name`.
        cpu_only: it always runs on the CPU, even if the other stages run on GPUs.
        repository: the end of its repository's name on the Hub; None if the stage is not pushed.
        description: the first sentence of its card.
        auto_class: the class of transformers that loads its folder; None if the stage makes data.
        task: the Hub's name of the task that its model is for.
        starts_from: the stage whose model it trains further.
        evaluated_as: the name of its model in the evaluation.
    """

    name: str
    title: str
    help: str
    needs: tuple[str, ...] = ()
    script: str | None = None
    cpu_only: bool = False
    repository: str | None = None
    description: str = ""
    auto_class: str | None = None
    task: str | None = None
    starts_from: str | None = None
    evaluated_as: str | None = None


STEPS = (
    StageRow(
        "tokenizer",
        title="Tokenizer",
        help="Train a tokenizer",
        cpu_only=True,
        repository="tokenizer",
        description="A byte-level BPE tokenizer with a chat template.",
        auto_class="AutoTokenizer",
    ),
    StageRow(
        "pretrain",
        title="Pre-training, causal",
        help="1. Pretrain a causal language model on plain text",
        needs=("tokenizer",),
        repository="base",
        description="A causal language model, pretrained on plain text. It continues text; it does not answer.",
        auto_class="AutoModelForCausalLM",
        task="text-generation",
        evaluated_as="base",
    ),
    StageRow(
        "pretrain_mlm",
        title="Pre-training, masked",
        help="1. Pretrain a masked language model on plain text",
        needs=("tokenizer",),
        script="pretrain",
        repository="mlm",
        description="A masked language model, pretrained on plain text.",
        auto_class="AutoModelForMaskedLM",
        task="fill-mask",
    ),
    StageRow(
        "sft",
        title="Supervised fine-tuning",
        help="2. Fine-tune on prompt -> answer pairs",
        needs=("pretrain",),
        repository="sft",
        description="A language model, fine-tuned on questions and answers.",
        auto_class="AutoModelForCausalLM",
        task="text-generation",
        starts_from="pretrain",
        evaluated_as="sft",
    ),
    StageRow(
        "candidates",
        title="Candidate answers",
        help="3.1 Let the SFT model write several answers to each prompt",
        needs=("sft",),
    ),
    StageRow(
        "rank",
        title="Ranking",
        help="3.2 Rank them: simulated people, or the annotator that you name, on a page in the browser",
        needs=("candidates",),
        cpu_only=True,
    ),
    StageRow(
        "preferences",
        title="Preferences",
        help="3.3 Make preference pairs of the rankings, and say how far the rankers agree",
        needs=("rank",),
        cpu_only=True,
        repository="preferences",
    ),
    StageRow(
        "reward",
        title="Reward model",
        help="3.4 Train the reward model on the pairs",
        needs=("sft", "preferences"),
        repository="reward",
        description="A reward model: one number for a prompt and its answer, trained on preference pairs.",
        auto_class="AutoModelForSequenceClassification",
        task="text-classification",
        starts_from="sft",
    ),
    StageRow(
        "constraints",
        title="Constraints",
        help="3.4 Add checkable constraints to prompts, for reward functions instead of a reward model",
        cpu_only=True,
    ),
    StageRow(
        "ppo",
        title="PPO",
        help="3.5 PPO against the reward model, or reward functions",
        needs=("sft", "reward", "constraints"),
        repository="ppo",
        description="A language model, trained with PPO against the reward model. Its critic is in `value_model/`.",
        auto_class="AutoModelForCausalLM",
        task="text-generation",
        starts_from="sft",
        evaluated_as="ppo",
    ),
    StageRow(
        "evaluate",
        title="Evaluation",
        help="Compare base, SFT and PPO on unseen prompts",
        needs=("pretrain", "pretrain_mlm", "sft", "reward", "constraints", "ppo"),
    ),
)
# The report reads the results of all steps.
REPORT = StageRow(
    "report",
    title="Report",
    help="report.json and report.html",
    needs=tuple(row.name for row in STEPS),
    cpu_only=True,
)
ROWS = (*STEPS, REPORT)
STAGES = {row.name: row for row in ROWS}
CHAIN = tuple(STAGES)


def main() -> None:
    """Print the names of the stages for the Makefile, or with `help` a help line for each."""
    for row in ROWS:
        sys.stdout.write(f"  make {row.name:<14} {row.help}\n" if sys.argv[1:] == ["help"] else f"{row.name}\n")


if __name__ == "__main__":
    main()
