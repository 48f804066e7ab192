"""Add checkable constraints to instructions, and make prompts to train on and prompts to judge by.

CPU (the only place it runs):
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/constraints.py \
        --config recipes/smollm2-instructions/constraints.yaml

From your own instructions (`prompt` or `messages`), judged by a file in IFEval's form:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/constraints.py \
        --config recipes/smollm2-instructions/constraints.yaml \
        --data_files my_prompts.jsonl --eval_data_files my_ifeval.jsonl --output_dir outputs/mine/constraints
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


COLUMNS = [("prompt",), ("messages",)]


@dataclass
class ConstraintsArguments:
    """Settings of the prompts: how long the instructions are, and how many prompts each of them gives."""

    output_dir: str = field(metadata={"help": "Folder of prompts_train.jsonl, prompts_eval.jsonl and result.json."})
    max_instruction_words: int = field(default=60, metadata={"help": "Leave out longer instructions."})
    max_instructions: int | None = field(default=None, metadata={"help": "Use only the first so many."})
    prompts_per_instruction: int = field(default=4, metadata={"help": "Prompts made of an instruction for training."})
    eval_prompts: int = field(default=512, metadata={"help": "Most prompts made of held-out instructions."})
    instruction_share: float = field(default=0.1, metadata={"help": "Share of the instructions that is held out."})
    seed: int = field(default=0, metadata={"help": "Seed of the constraints."})

    def __post_init__(self):
        if not 0 < self.instruction_share < 1:
            raise ValueError(f"instruction_share: {self.instruction_share}; a share lies between 0 and 1")


def main(args, data, stage):
    from sandan.constraints.prompts import (
        CHECKED,
        IFEVAL,
        SEEN_KINDS,
        constraint_prompts,
        instructions_of,
        split_instructions,
    )
    from sandan.core.errors import UserError
    from sandan.data.chat import to_turns
    from sandan.data.jsonl import write_jsonl
    from sandan.data.loading import load_data

    rows, benchmark = load_data(data, stage, COLUMNS)
    instructions = instructions_of(rows.to_list(), args.max_instruction_words)[: args.max_instructions]
    train, held_out = split_instructions(instructions, args.instruction_share)
    if not train or not held_out:
        raise UserError(f"instruction_share: {args.instruction_share} of {len(instructions):,} leaves one side empty")
    prompts = constraint_prompts(train, args.prompts_per_instruction, args.seed)
    judged = constraint_prompts(held_out, 1, args.seed + 1)[: args.eval_prompts]
    judged = [row | {"group": SEEN_KINDS} for row in judged]
    # IFEval's own prompts are only judged, never trained on.
    for row in benchmark or ():
        if missing := [name for name in CHECKED if not row.get(name)]:
            raise UserError(
                f"eval data: no {', '.join(missing)}; expected IFEval's columns: prompt, {', '.join(CHECKED)}"
            )
        turns = to_turns(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
        judged.append({"prompt": turns, **{name: row[name] for name in CHECKED}, "group": IFEVAL})
    folder = stage.begin_writing()
    write_jsonl(folder / "prompts_train.jsonl", prompts)
    write_jsonl(folder / "prompts_eval.jsonl", judged)
    metrics = {"instructions": len(instructions), "train_prompts": len(prompts), "eval_prompts": len(judged)}
    metrics["constraints_per_prompt"] = sum(len(row["kwargs"]) for row in prompts) / len(prompts)
    stage.finish(metrics)


if __name__ == "__main__":
    run(main, ConstraintsArguments, "sandan.data.loading:DataArguments")
