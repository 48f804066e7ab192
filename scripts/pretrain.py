"""Pretrain a causal (`objective: clm`) or masked (`objective: mlm`) language model, from scratch or from a saved one.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/pretrain.py \
        --config recipes/tiny/pretrain.yaml

1 GPU:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/pretrain.py \
        --config recipes/english-small/pretrain.yaml

8 GPUs:
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml scripts/pretrain.py \
        --config recipes/english-small/pretrain.yaml
"""

from sandan.run.cli import run


COLUMNS = [("text",)]


def main(args, config, model_args, data, stage):
    from datasets import Dataset
    from transformers import set_seed

    from sandan.data.loading import load_data
    from sandan.models.loading import load_tokenizer, require_model
    from sandan.models.tokens import find_stop_tokens, save_stop_tokens
    from sandan.pretrain.masking import make_collator
    from sandan.pretrain.model_and_blocks import bits_per_byte, bytes_per_token, masked_accuracy, to_blocks
    from sandan.pretrain.order import OrderedTrainer
    from sandan.pretrain.trainer import BlockTrainer
    from sandan.training.train_and_save import train_and_save

    masked = args.objective == "mlm"
    tokenizer = load_tokenizer(require_model(args.tokenizer_name_or_path, stage, "tokenizer_name_or_path"))
    train, held_out = load_data(data, stage, COLUMNS)
    set_seed(config.seed)
    model = make_model(args, model_args, tokenizer, stage)
    if not masked:
        save_stop_tokens(model, tokenizer, find_stop_tokens(tokenizer, model.generation_config))

    texts = [] if held_out is None else held_out["text"][:]
    with config.main_process_first(desc="packing"):
        train = to_blocks(train, tokenizer, args.block_size_tokens, config.dataloader_num_workers or None)
        held_out = to_blocks(held_out, tokenizer, args.block_size_tokens) if held_out is not None else None
    trainer = (OrderedTrainer if masked else BlockTrainer)(
        model,
        config,
        make_collator(args, tokenizer, config.seed),
        train,
        held_out,
        processing_class=tokenizer,
        compute_metrics=masked_accuracy if masked else None,
        preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1)) if masked else None,
    )
    metrics = train_and_save(trainer, stage)
    metrics["parameters"] = model.num_parameters()
    if isinstance(train, Dataset):
        metrics["train_tokens"] = len(train) * args.block_size_tokens
    if texts and not masked:
        ratio = bytes_per_token(texts, tokenizer)
        metrics["eval_bits_per_byte"] = bits_per_byte(metrics["eval_loss"], ratio)
        metrics["untrained_bits_per_byte"] = bits_per_byte(metrics["eval_loss_before"], ratio)
    stage.finish(metrics, config.device.type)


def make_model(args, model_args, tokenizer, stage):
    """Return a new model, or the one to train further, after a check that it fits the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from sandan.models.checks import check_direction, check_length, make_savable
    from sandan.models.loading import check_reading, check_vocabulary, load_model, model_init_kwargs, require_model
    from sandan.pretrain.model_and_blocks import new_model

    if args.model_config is None:
        auto_model = AutoModelForMaskedLM if args.objective == "mlm" else AutoModelForCausalLM
        path = require_model(model_args.model_name_or_path, stage)
        model = load_model(auto_model, path, **model_init_kwargs(model_args))
    else:
        path, model = "model_config", new_model(args, tokenizer)
    check_length("block_size_tokens", args.block_size_tokens, model.config, path)
    if args.objective == "clm":
        check_direction(model, path)
    make_savable(model, path)
    check_vocabulary(model.config, tokenizer, args.tokenizer_name_or_path)
    check_reading(tokenizer, args.tokenizer_name_or_path, model.config)
    return model


if __name__ == "__main__":
    run(
        main,
        "sandan.pretrain.model_and_blocks:PretrainArguments",
        "transformers:TrainingArguments",
        "trl:ModelConfig",
        "sandan.data.loading:DataArguments",
        preview="sandan.pretrain.preview",
        row=lambda args, *_: "pretrain_mlm" if args.objective == "mlm" else "pretrain",
    )
