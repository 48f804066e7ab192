"""Make prompts with constraints from instructions: text for the model, and IFEval's columns for the checkers."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.chat import first_user_text, split_by_prompt
from .kinds import KINDS, Kind, contradict


MOST_CONSTRAINTS = 3
# IFEval's columns beside the prompt.
CHECKED = ("instruction_id_list", "kwargs")
# The names of the groups of prompts in an evaluation.
SEEN_KINDS, IFEVAL = "seen kinds", "ifeval"
JOINTS = (" ", "\n", "\n\n")


def instructions_of(rows: Sequence[dict[str, Any]], max_words: int) -> list[str]:
    """Return the different instructions of rows with a `prompt` or `messages`: the first user turn of each.

    Args:
        max_words: longer ones are left out.
    """
    found = dict.fromkeys(first_user_text(row).strip() for row in rows)
    return [text for text in found if text and len(text.split()) <= max_words]


def split_instructions(instructions: Sequence[str], held_out_share: float) -> tuple[list[str], list[str]]:
    """Split instructions by their hash into those to train on and those to hold out."""
    held = split_by_prompt(instructions, held_out_share, seed=0)
    pairs = list(zip(instructions, held, strict=True))
    return [text for text, out in pairs if not out], [text for text, out in pairs if out]


def constraint_prompts(instructions: Sequence[str], variants: int, seed: int) -> list[dict[str, Any]]:
    """Return `variants` prompts for each instruction, each with one to three constraints, in random order.

    Returns:
        Rows of `prompt` (one user turn), `instruction_id_list` and `kwargs`, as in IFEval.
    """
    rng = random.Random(seed)
    rows = [_with_constraints(text, rng) for text in instructions for _ in range(variants)]
    # The same instruction with the same constraints in the same words is rare, but would be a repeated row.
    different = list({row["prompt"][0]["content"]: row for row in rows}.values())
    rng.shuffle(different)
    return different


def _with_constraints(instruction: str, rng: random.Random) -> dict[str, Any]:
    chosen = list(_drawn(instruction, rng.randint(1, MOST_CONSTRAINTS), rng))
    # "… their sum Use less than" would be hard to read.
    begin = f"{instruction}." if instruction[-1].isalnum() else instruction
    text = rng.choice(JOINTS).join([begin, *(kind.text(kwargs, rng) for kind, kwargs in chosen)])
    return {
        "prompt": [{"role": "user", "content": text}],
        "instruction_id_list": [kind.instruction_id for kind, _ in chosen],
        "kwargs": [kwargs for _, kwargs in chosen],
    }


def _drawn(instruction: str, count: int, rng: random.Random) -> Iterator[tuple[Kind, dict[str, Any]]]:
    """Yield at most `count` kinds that suit the instruction and each other, with their kwargs."""
    taken: list[Kind] = []
    for kind in rng.sample(KINDS, len(KINDS)):
        if len(taken) == count:
            return
        if any(contradict(kind, other) for other in taken):
            continue
        if (kwargs := kind.draw(rng, instruction)) is not None:
            taken.append(kind)
            yield kind, kwargs
