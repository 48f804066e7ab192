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

    from sandan.data.lengths import without_cut_answers
    from sandan.data.loading import load_data
    from sandan.models.loading import check_vocabulary, load_tokenizer, require_model
    from sandan.models.tokens import set_stop_token
    from sandan.sft.trainer import GuardedSFTTrainer
    from sandan.training.train_and_save import count_dropped, make_trl_trainer, train_and_save

    path = require_model(model_args.model_name_or_path, stage)
    tokenizer = load_tokenizer(path, model_args.model_revision)
    own_template = config.chat_template_path is None
    read, held_out = load_data(data, stage, COLUMNS, tokenizer if own_template else None)
    train = without_cut_answers(read, tokenizer, config.max_length) if own_template else read
    if held_out is not None and own_template:
        held_out = without_cut_answers(held_out, tokenizer, config.max_length, "held-out rows")
    trainer = make_trl_trainer(GuardedSFTTrainer, path, config, model_args, (train, held_out), tokenizer)
    check_vocabulary(trainer.model.config, tokenizer, path)
    set_stop_token(trainer.model, tokenizer)
    dropped = 0 if config.packing else count_dropped(train, trainer.train_dataset, config.max_length, "training rows")
    dropped += len(read) - len(train) if isinstance(read, Dataset) else 0
    metrics = train_and_save(trainer, stage)
    stage.finish(metrics | {"dropped_rows": dropped, "parameters": trainer.model.num_parameters()}, config.device.type)


if __name__ == "__main__":
    run(main, "trl:SFTConfig", "trl:ModelConfig", "sandan.data.loading:DataArguments", preview="sandan.sft.preview")
