"""Train a reward model on preference pairs with `trl.RewardTrainer`, and check that it can pick good answers.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/reward.py \
        --config recipes/tiny/reward.yaml

1 GPU:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/reward.py \
        --config recipes/english-small/reward.yaml

8 GPUs:
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml scripts/reward.py \
        --config recipes/english-small/reward.yaml
"""

import json

from sandan.run.cli import run


COLUMNS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]


def main(args, config, model_args, data, stage):
    import torch
    from datasets import Dataset, concatenate_datasets

    from sandan.core.errors import UserError
    from sandan.core.files import write_text
    from sandan.data.chat import prompt_id
    from sandan.data.loading import load_data
    from sandan.models.checks import fit_max_length, make_savable
    from sandan.models.loading import base_of, load_tokenizer, require_model
    from sandan.preference.broken_answers import broken_pairs
    from sandan.reward.gate import best_of_n_prompts, gate
    from sandan.reward.metrics import check_disjoint, evaluate_pairs, init_head, store_scale
    from sandan.reward.trainer import GroupedRewardTrainer, prompt_weights
    from sandan.training.train_and_save import count_dropped, make_trl_trainer, train_and_save

    path = require_model(model_args.model_name_or_path, stage)
    fit_max_length(config, path, "max_length" in stage.given, model_args.model_revision)
    stage.config["max_length"] = config.max_length
    tokenizer = load_tokenizer(path, model_args.model_revision)
    train, held_out = load_data(data, stage, COLUMNS, tokenizer if config.chat_template_path is None else None)
    if args.oracle != "none":
        best_of_n_prompts(args, tokenizer, path, stage)
    held_out_rows = [] if held_out is None else held_out.to_list()
    about = [name for name in ("prompt_id", "prompt") if name in train.column_names] or ["chosen"]
    check_disjoint(list(train.select_columns(about)), held_out_rows)
    if "margin" in train.column_names and not args.use_margin:
        train = train.remove_columns("margin")
        held_out = held_out.remove_columns("margin") if held_out is not None else None
    if args.broken_answer_share:
        # None may be made: a short answer cannot be damaged.
        made = list(broken_pairs(train.to_list(), args.broken_answer_share, tokenizer, config.seed))
        if made:
            train = concatenate_datasets([train, Dataset.from_list(made, features=train.features)])
    if args.pair_weighting == "prompt":
        if "prompt" not in train.column_names:
            raise UserError("pair_weighting: prompt: the training pairs have no column prompt; use pair")
        train = train.add_column("weight", prompt_weights([prompt_id(row) for row in train]))
    model_args.lora_task_type = "SEQ_CLS"  # TRL's default is the task type of a language model
    trainer = make_trl_trainer(GroupedRewardTrainer, path, config, model_args, (train, held_out), tokenizer)
    if not model_args.use_peft:
        init_head(trainer.model.score, config.seed)
    make_savable(base_of(trainer.model), path)
    dropped = count_dropped(train, trainer.train_dataset, config.max_length, "training pairs")
    metrics = train_and_save(trainer, stage) | {"dropped_rows": dropped}
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Do not compile the scoring below: with a cache and padding, every layer would be compiled anew.
    torch.compiler.set_stance("force_eager")
    if held_out_rows:
        measured, diagnosis = evaluate_pairs(model, tokenizer, held_out_rows, args.oracle, config.max_length)
        metrics |= measured
        write_text(stage.output_dir / "diagnostics.json", json.dumps(diagnosis, indent=1, ensure_ascii=False) + "\n")
    metrics |= store_scale(model, tokenizer, held_out_rows or train, stage.output_dir)
    if args.oracle != "none":
        metrics |= gate(args, model, tokenizer, path, stage)
    stage.finish(metrics, config.device.type)


if __name__ == "__main__":
    run(
        main,
        "sandan.reward.gate:RewardArguments",
        "trl:RewardConfig",
        "trl:ModelConfig",
        "sandan.data.loading:DataArguments",
        preview="sandan.reward.preview",
    )
