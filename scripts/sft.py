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

from sandan.cli import run


def main(config, model_args, data, stage):
    from trl import get_peft_config

    from sandan.data import load_data
    from sandan.models import check_vocabulary, load_tokenizer, model_init_kwargs, require_model
    from sandan.sft_trainer import GuardedSFTTrainer
    from sandan.training import count_dropped, set_stop_token, train_and_save

    path = require_model(model_args.model_name_or_path, stage)
    tokenizer = load_tokenizer(path, model_args.model_revision)
    train, held_out = load_data(data, stage, columns=[("prompt", "completion"), ("messages",), ("text",)])
    config.model_init_kwargs = model_init_kwargs(model_args, config.model_init_kwargs)
    trainer = GuardedSFTTrainer(
        path,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    check_vocabulary(trainer.model.config, tokenizer, path)
    set_stop_token(trainer.model, tokenizer)
    dropped = 0 if config.packing else count_dropped(train, trainer.train_dataset, config.max_length, "training rows")
    metrics = train_and_save(trainer, stage)
    stage.finish(metrics | {"dropped_rows": dropped, "parameters": trainer.model.num_parameters()}, config.device.type)


if __name__ == "__main__":
    run(main, "trl:SFTConfig", "trl:ModelConfig", "sandan.data:DataArguments")
