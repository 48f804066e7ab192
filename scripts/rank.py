"""Rank candidate answers by simulated people, who follow the world's oracle with random noise.

Real people rank on a page in the browser (scripts/annotate.py), models with scripts/judge.py; their logs have the same
format.

CPU (the only place it runs):
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/rank.py --config recipes/tiny/rank.yaml

More careful rankers:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/rank.py \
        --config recipes/tiny/rank.yaml --ranker_agreement 0.85
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class RankArguments:
    """Settings of the simulated rankers: how many there are, and how often two of them agree."""

    output_dir: str = field(metadata={"help": "Folder of judgements.jsonl and result.json."})
    candidates_file: str = field(metadata={"help": "JSONL with prompt_id, prompt, candidates."})
    annotators: int = field(default=5, metadata={"help": "Number of simulated rankers."})
    judgements_per_prompt: int = field(default=2, metadata={"help": "How many of them rank each prompt's answers."})
    ranker_agreement: float = field(default=0.75, metadata={"help": "Share of pairs two rankers order alike."})
    seed: int = field(default=0, metadata={"help": "Seed of the rankers' noise."})

    def __post_init__(self):
        if not 0.5 < self.ranker_agreement < 1:
            raise ValueError(
                f"ranker_agreement: {self.ranker_agreement}; two rankers agree in more than 0.5, less than 1"
            )
        if not 1 <= self.judgements_per_prompt <= self.annotators:
            raise ValueError(f"judgements_per_prompt: {self.judgements_per_prompt} of {self.annotators} annotators")


def main(args, stage):
    import random
    from datetime import datetime, timezone

    from sandan.data.chat import prompt_id
    from sandan.data.jsonl import read_jsonl, write_jsonl
    from sandan.preference.simulated_rankers import noise_temperature, simulate_ranks
    from sandan.world.oracle import judge

    rows = read_jsonl(stage.add_input(args.candidates_file), columns=[("prompt_id", "prompt", "candidates")])
    utilities = [[judge(row["prompt"], text).score for text in row["candidates"]] for row in rows]
    temperature = noise_temperature(utilities, args.ranker_agreement)
    rng = random.Random(args.seed)
    judgements = []
    for row, scores in zip(rows, utilities, strict=True):
        for annotator in rng.sample(range(args.annotators), args.judgements_per_prompt):
            order = rng.sample(range(len(scores)), len(scores))
            judgements.append(
                {
                    "prompt_id": prompt_id(row),
                    "prompt": row["prompt"],
                    "candidates": [row["candidates"][index] for index in order],
                    "ranks": simulate_ranks([scores[index] for index in order], temperature, rng),
                    "annotator": f"simulated-{annotator + 1}",
                    "annotator_kind": "simulated",
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
            )
    write_jsonl(stage.begin_writing() / "judgements.jsonl", judgements)
    stage.finish(
        {
            "judgements": len(judgements),
            "noise_temperature": temperature,
            "candidate_score": sum(map(sum, utilities)) / sum(map(len, utilities)),
            "best_candidate_score": sum(map(max, utilities)) / len(utilities),
        }
    )


if __name__ == "__main__":
    run(main, RankArguments)
