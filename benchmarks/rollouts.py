"""New tokens per second of `sandan.models.cuda_graph_sampling.Decoder` and of `generate`, on one GPU.

    python benchmarks/rollouts.py --rows 64 256
    python benchmarks/rollouts.py --rows 64 --engines generate graph --output rollouts.json

The model has Qwen2.5-0.5B's shape and random weights in bfloat16. Prompts have 128 tokens, answers 256; temperature 1,
no filters. Engines: "generate" (dynamic cache), "static" (`generate` with a static cache, compiled), "graph" (sandan),
"compiled" (sandan with `torch_compile`). Each engine runs once to warm up, then all take turns. Prints JSON.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ENGINES = ("generate", "static", "graph", "compiled")
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_window_layers": 24,
}
# The same shape as a Llama configuration. With a qwen2 model, transformers loads every tokenizer as Qwen2's own class,
# and a tokenizer with one token per word then gives no tokens at all.
AS_LLAMA = {name: value for name, value in SHAPE.items() if name != "max_window_layers"}
AS_LLAMA |= {"model_type": "llama", "attention_bias": True, "max_position_embeddings": 4096}
# A stop token that a model of random weights is unlikely to draw, so that no answer stops early.
NO_STOP = 151_935


def make_model() -> "PreTrainedModel":
    """Return a model of random weights in Qwen2.5-0.5B's shape, in bfloat16 on the GPU."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        return Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPE), dtype=torch.bfloat16).eval()


def engine(name: str, model: "PreTrainedModel", rows: int, new_tokens: int) -> "Callable[[torch.Tensor], Any]":
    """Return a function that samples answers to prompts `(rows, P)`."""
    import torch
    from transformers import GenerationConfig

    from sandan.models.cuda_graph_sampling import Decoder

    if name in ("graph", "compiled"):
        decoder = Decoder(model, rows, new_tokens, torch.bfloat16, compiled=name == "compiled")

        def sample(ids):
            decoder.load(model)
            return decoder.sample(ids, torch.ones_like(ids), 1.0, NO_STOP)

        return sample
    config = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=NO_STOP
    )
    if name == "static":
        config.cache_implementation = "static"
    return lambda ids: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def measure(rows: int, engines: list[str], prompt_tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Measure the seconds of each engine, in turns; the first call of each is reported separately."""
    import torch

    model = make_model()
    ids = torch.randint(0, 150_000, (rows, prompt_tokens), device="cuda")
    found: dict[str, Any] = {}
    ready = {}

    def timed(name: str) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        ready[name](ids)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    for name in engines:
        ready[name] = engine(name, model, rows, new_tokens)
        torch.cuda.reset_peak_memory_stats()
        found[name] = {"first_call_seconds": round(timed(name), 1), "seconds": []}
        found[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for _ in range(rounds):
        for name in engines:
            found[name]["seconds"].append(round(timed(name), 4))
    for figures in found.values():
        seconds = statistics.median(figures["seconds"])
        figures["tokens_per_second"] = round(rows * new_tokens / seconds)
        figures["milliseconds_per_token"] = round(1000 * seconds / new_tokens, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="answers sampled at once")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    import torch
    import transformers

    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": {},
    }
    for rows in args.rows:
        found = measure(rows, args.engines, args.prompt_tokens, args.new_tokens, args.rounds)
        result["rows"][rows] = found
        for ours in {"graph", "compiled"} & set(found):
            for peer in {"generate", "static"} & set(found):
                ratio = found[ours]["tokens_per_second"] / found[peer]["tokens_per_second"]
                found[ours][f"ratio_to_{peer}"] = round(ratio, 2)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
