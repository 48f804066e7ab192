"""Let the SFT model write several candidate answers to each prompt, for people (or simulated rankers) to rank.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/candidates.py \
        --config recipes/tiny/candidates.yaml

1 GPU, more candidates:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/candidates.py \
        --config recipes/tiny/candidates.yaml --candidates_per_prompt 8
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


COLUMNS = [("prompt",)]


@dataclass
class CandidatesArguments:
    """Settings of the sampling of candidate answers."""

    output_dir: str = field(metadata={"help": "Folder of candidates.jsonl and result.json."})
    model_name_or_path: str = field(metadata={"help": "The SFT model."})
    candidates_per_prompt: int = field(default=4, metadata={"help": "Answers sampled for each prompt (2 to 9)."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    batch_size: int = field(default=256, metadata={"help": "Answers sampled at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})

    def __post_init__(self):
        if not 2 <= self.candidates_per_prompt <= 9:
            raise ValueError(f"candidates_per_prompt: {self.candidates_per_prompt}; people rank 2 to 9 answers")


def main(args, data, stage):
    from sandan.data.chat import prompt_id
    from sandan.data.jsonl import write_jsonl
    from sandan.data.loading import load_data
    from sandan.models.checks import check_prompts
    from sandan.models.loading import load_causal_lm, load_tokenizer, require_model
    from sandan.models.rendering import encode_prompts
    from sandan.models.sampling import sample_completions
    from sandan.preference.simulated_rankers import distinct_candidates

    path = require_model(args.model_name_or_path, stage)
    tokenizer = load_tokenizer(path)
    prompts, _ = load_data(data, stage, COLUMNS, tokenizer)
    model = load_causal_lm(path)
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts["prompt"][:])]
    check_prompts(lengths, args.max_new_tokens, "max_new_tokens", model.config, path)
    completions = sample_completions(
        model,
        tokenizer,
        prompts["prompt"][:],
        args.max_new_tokens,
        args.temperature,
        args.candidates_per_prompt,
        args.batch_size,
        args.seed,
        description="candidates",
    )
    rows = [
        {"prompt_id": prompt_id(row), "prompt": row["prompt"], "candidates": distinct_candidates(answers)}
        for row, answers in zip(prompts, completions, strict=True)
    ]
    kept = [row for row in rows if len(row["candidates"]) > 1]
    write_jsonl(stage.begin_writing() / "candidates.jsonl", kept)
    sampled = [answer for answers in completions for answer in answers]
    stage.finish(
        {
            "prompts": len(rows),
            "rankable_prompts": len(kept),
            "distinct_share": sum(len(row["candidates"]) for row in rows) / len(sampled),
            "stopped_share": sum(answer.stopped for answer in sampled) / len(sampled),
            "response_tokens": sum(len(answer.token_ids) for answer in sampled) / len(sampled),
        },
        model.device.type,
    )


if __name__ == "__main__":
    run(main, CandidatesArguments, "sandan.data.loading:DataArguments")
