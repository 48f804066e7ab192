"""Fine-tune a model on prompt -> answer pairs (or conversations) with `trl.SFTTrainer`; only answers are trained.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/sft.py --config recipes/tiny/sft.yaml

1 GPU:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/sft.py \
        --config recipes/english-small/sft.yaml

8 GPUs, LoRA:
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml scripts/sft.py \
        --config recipes/english-small/sft.yaml --use_peft --lora_r 16
"""

from sandan.run.cli import run


COLUMNS = [("prompt", "completion"), ("messages",), ("text",)]


def main(config, model_args, data, stage):
    from datasets import Dataset

    from sandan.data.loading import load_data
    from sandan.models.checks import check_direction, fit_max_length, make_savable
    from sandan.models.loading import base_of, check_vocabulary, load_tokenizer, require_model
    from sandan.models.tokens import find_stop_tokens, save_stop_tokens
    from sandan.sft.trainer import GuardedSFTTrainer
    from sandan.training.train_and_save import count_dropped, make_trl_trainer, train_and_save

    path = require_model(model_args.model_name_or_path, stage)
    fit_max_length(config, path, "max_length" in stage.given, model_args.model_revision)
    stage.config["max_length"] = config.max_length
    tokenizer = load_tokenizer(path, model_args.model_revision)
    train, held_out = load_data(data, stage, COLUMNS, tokenizer if config.chat_template_path is None else None)
    trainer = make_trl_trainer(GuardedSFTTrainer, path, config, model_args, (train, held_out), tokenizer)
    check_vocabulary(trainer.model.config, tokenizer, path)
    check_direction(base_of(trainer.model), path)
    save_stop_tokens(trainer.model, tokenizer, find_stop_tokens(tokenizer, trainer.model.generation_config))
    make_savable(base_of(trainer.model), path)
    # How many rows a stream has, and how many of them are too long, is not known.
    counted = isinstance(train, Dataset) and not config.packing
    dropped = 0 if not counted else count_dropped(train, trainer.train_dataset, config.max_length, "training rows")
    metrics = train_and_save(trainer, stage)
    stage.finish(metrics | {"dropped_rows": dropped, "parameters": trainer.model.num_parameters()}, config.device.type)


if __name__ == "__main__":
    run(main, "trl:SFTConfig", "trl:ModelConfig", "sandan.data.loading:DataArguments", preview="sandan.sft.preview")
