"""Compare base, SFT and PPO models on unseen prompts, and the pretrained ones on minimal pairs.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/evaluate.py \
        --config recipes/tiny/evaluate.yaml

1 GPU:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/evaluate.py \
        --config recipes/english-small/evaluate.yaml
"""

import json

from sandan.run.cli import run


COLUMNS = [("prompt",)]


def main(args, data, stage):
    from sandan.core.files import write_text
    from sandan.data.jsonl import read_jsonl, write_jsonl
    from sandan.data.loading import load_data
    from sandan.evaluate.comparison import compare, fitting_prompts, load_masked
    from sandan.evaluate.judges import function_judges, gold_judge, refuse_known_judge, reward_of
    from sandan.models.loading import (
        check_same_tokens,
        load_causal_lm,
        load_reward_model,
        load_tokenizer,
        require_model,
    )

    paths = {name: getattr(args, f"{name}_model") for name in ("base", "sft", "ppo")}
    paths = {name: path for name, path in paths.items() if path is not None}
    others = {"reward": args.reward_model, "masked": args.masked_model, "gold_reward": args.gold_reward_model}
    for name, path in {**paths, **others}.items():
        if path is not None:
            require_model(path, stage, f"{name}_model")
    if args.gold_reward_model:
        refuse_known_judge(args.gold_reward_model, (args.reward_model, reward_of(args.ppo_model)))
    tokenizer = load_tokenizer(paths["sft"])
    prompts, held_out = load_data(data, stage, COLUMNS, tokenizer)
    texts = read_jsonl(stage.add_input(args.text_file), columns=[("text",)]) if args.text_file else []
    pairs = []
    if args.minimal_pairs_file:
        pairs = read_jsonl(stage.add_input(args.minimal_pairs_file), columns=[("skill", "good", "bad")])
    for name, path in {**paths, "reward": args.reward_model}.items():
        if path is not None:
            check_same_tokens(tokenizer, path, f"{name}_model")
    # If the data are split here (held_out_share), only the held-out part is unseen.
    rows = fitting_prompts((held_out or prompts).to_list(), tokenizer, args)
    judges = function_judges(args.gold_functions or [], list(rows[0]))
    if args.gold_reward_model:
        judges.append(gold_judge(args.gold_reward_model, tokenizer))
    models = {name: load_causal_lm(path) for name, path in paths.items()}
    reward_model = load_reward_model(args.reward_model) if args.reward_model else None
    # Loaded before anything is generated, which takes long.
    masked = load_masked(args.masked_model) if args.masked_model else None
    scorers = [path for path in (args.reward_model, args.gold_reward_model) if path is not None]
    check_lengths(rows, tokenizer, args, [*paths.values(), *scorers])
    comparison, samples = compare(models, tokenizer, rows, args, reward_model, [row["text"] for row in texts], judges)
    metrics = {f"{row['model']}/{key}": value for row in comparison for key, value in row.items() if key != "model"}
    metrics |= minimal_pairs(pairs, tokenizer, models.get("base"), masked)
    folder = stage.begin_writing()
    write_text(folder / "comparison.json", json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
    write_jsonl(folder / "samples.jsonl", samples)
    stage.finish(metrics, models["sft"].device.type)


def check_lengths(rows, tokenizer, args, paths):
    """Refuse prompts that leave no room for an answer in the positions of one of the models."""
    from sandan.models.checks import check_prompts, config_of
    from sandan.models.rendering import encode_prompts

    lengths = [len(ids) for ids in encode_prompts(tokenizer, [row["prompt"] for row in rows])]
    for path in paths:
        if (found := config_of(path)) is not None:
            check_prompts(lengths, args.max_new_tokens, "max_new_tokens", found, path, "max_prompt_tokens")


def minimal_pairs(pairs, tokenizer, base, masked):
    """Return the accuracy on minimal pairs by skill, of the base model and of the masked one, as far as there."""
    from functools import partial

    from sandan.evaluate.comparison import log_probs, minimal_pair_accuracy, pseudo_log_probs

    scorers = {}
    if base is not None:
        scorers["clm"] = lambda ids: log_probs(base, ids, [1] * len(ids))
    if masked is not None:
        scorers["mlm"] = partial(pseudo_log_probs, *masked)
    return {
        f"minimal_pairs/{kind}/{skill}": accuracy
        for kind, score in (scorers.items() if pairs else ())
        for skill, accuracy in minimal_pair_accuracy(pairs, tokenizer, score).items()
    }


if __name__ == "__main__":
    run(main, "sandan.evaluate.comparison:EvaluateArguments", "sandan.data.loading:DataArguments")
