"""Speed, memory and disk of tokenizing, packing and loading pretraining blocks on one core, by the size of the text.

    python benchmarks/packing.py --megabytes 10 100 1000
    python benchmarks/packing.py --megabytes 100 --text my.jsonl.gz

The text is repeated up to the size; the vocabulary is the one that scripts/tokenizer.py would train on it. Each size
is measured in a separate process, so that peaks are its own: `grown_mb` is the most that packing allocated,
`peak_rss_mb` is the whole process with the memory-mapped pages of its files, which the system frees when it needs to.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from sandan.core.stage import VERSIONED, describe_device
from sandan.pretrain.masking import BlockCollator
from sandan.pretrain.model_and_blocks import to_blocks
from sandan.pretrain.tokenizer import train_tokenizer


DATA = str(Path(__file__).parents[1] / "data" / "pretrain.jsonl")
BLOCK_TOKENS, ROWS, BATCHES, VOCABULARY = 1024, 32, 50, 32_000


def allocated_mb() -> float:
    """Return the memory of this process in MB, without memory-mapped files."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").split("RssAnon:")[1].split()[0]) / 1e3


def loaded_tokens_per_second(rows: Any, collator: Any, workers: int) -> int:
    batches = iter(DataLoader(rows, ROWS, shuffle=True, num_workers=workers, collate_fn=collator))
    next(batches)
    started = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in islice(batches, BATCHES))
    return round(tokens / (time.perf_counter() - started))


def measure(text: str, tokenizer_path: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    documents = load_dataset("json", data_files=text, split="train")
    before, allocated, done = allocated_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            allocated.append(allocated_mb())

    threading.Thread(target=watch).start()
    started = time.perf_counter()
    blocks = to_blocks(documents, tokenizer, BLOCK_TOKENS)
    seconds = time.perf_counter() - started
    done.set()
    loaders = {"sandan": (blocks, BlockCollator())}
    loaders["stock, lists"] = blocks.with_format(None), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return {
        "tokens": len(blocks) * BLOCK_TOKENS,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(len(blocks) * BLOCK_TOKENS / seconds),
        "mb_per_second": round(Path(text).stat().st_size / 1e6 / seconds, 2),
        "grown_mb": round(max(allocated) - before),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "disk_mb": round(sum(Path(file["filename"]).stat().st_size for file in blocks.cache_files) / 1e6, 1),
        "loaded_tokens_per_second": {
            f"{name}, {workers} workers": loaded_tokens_per_second(rows, collator, workers)
            for name, (rows, collator) in loaders.items()
            for workers in (0, 2)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100])
    parser.add_argument("--text", default=DATA, help="JSONL with `text`, gzip too")
    args = parser.parse_args()
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": describe_device("cpu")}
    result["versions"] = {name: metadata.version(name) for name in (*VERSIONED, "pyarrow")}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_DATASETS_CACHE": folder, "TOKENIZERS_PARALLELISM": "false"}
        texts = load_dataset("json", data_files=args.text, split="train", cache_dir=folder)["text"][:]
        train_tokenizer(texts, VOCABULARY).save_pretrained(folder)
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
        for size in args.megabytes:
            file, repeated, written = Path(folder, f"{size:g}.jsonl"), cycle(lines), 0
            with file.open("wb") as stream:
                while written < size * 1e6:
                    written += stream.write(next(repeated))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result[f"{size:g} MB"] = process.submit(measure, str(file), folder).result()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
