"""Train a tokenizer: byte-level BPE on any text, with a chat template.

CPU (the only place it runs):
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/tokenizer.py \
        --config recipes/tiny/tokenizer.yaml

Your own text:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/tokenizer.py \
        --config recipes/tiny/tokenizer.yaml --data_files my.jsonl --output_dir outputs/mine/tokenizer
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


COLUMNS = [("text",), ("prompt", "completion"), ("messages",)]


@dataclass
class TokenizerArguments:
    """Settings of the tokenizer: vocabulary size and output folder."""

    output_dir: str = field(metadata={"help": "Folder of the tokenizer and result.json."})
    vocab_size: int = field(
        default=8192, metadata={"help": "Size of the vocabulary, bytes and special tokens included."}
    )
    seed: int = field(default=0, metadata={"help": "Recorded only: training a tokenizer has no randomness."})


def main(args, data, stage):
    from sandan.data.loading import load_data
    from sandan.pretrain.tokenizer import texts_of, train_tokenizer

    train, held_out = load_data(data, stage, COLUMNS)
    tokenizer = train_tokenizer(texts_of(train), args.vocab_size)
    texts = list(texts_of(held_out if held_out is not None else train.select(range(min(len(train), 1000)))))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    metrics = {
        "vocab_size": len(tokenizer),
        "bytes_per_token": sum(len(text.encode()) for text in texts) / sum(map(len, encoded)),
        "lossless_share": sum(map(str.__eq__, tokenizer.batch_decode(encoded), texts)) / len(texts),
    }
    tokenizer.save_pretrained(stage.begin_writing())
    stage.finish(metrics)


if __name__ == "__main__":
    run(main, TokenizerArguments, "sandan.data.loading:DataArguments")
