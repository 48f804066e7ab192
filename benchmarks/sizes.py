"""Cost of pretraining on one GPU: tokens/s, MFU and memory of models from 1M to 1B parameters.

    python benchmarks/sizes.py --output sizes.json
    python benchmarks/sizes.py --shapes 124m 1b --torch_compile
    python benchmarks/sizes.py --shapes tiny --device cpu

Each model has Llama's architecture and random weights, and is trained on random text by scripts/pretrain.py as in
scaling.py, for 20 to 30 seconds. `hours` are the GPU hours at that pace for 20 tokens per parameter (Hoffmann et al.
2022, arXiv 2203.15556) and for a grid of numbers of tokens. Prints JSON and a table.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launching import about
from scaling import Mode, Workshop, rounded, run, tiny


# Rows and tokens that keep the GPU busy and fit into 80 GB.
MODES = {
    "1m": Mode("pretrain", "ddp", "1m", 256, 512, (200, 50)),
    "10m": Mode("pretrain", "ddp", "10m", 64, 1024, (120, 30)),
    "124m": Mode("pretrain", "ddp", "124m", 32, 1024, (60, 15)),
    "350m": Mode("pretrain", "ddp", "350m", 16, 1024, (50, 15)),
    "1b": Mode("pretrain", "ddp", "1b", 4, 2048, (40, 10)),
    "tiny": tiny(Mode("pretrain", "ddp", "tiny", 2, 24)),
}
TOKENS_PER_PARAMETER = 20
GRID = (1e8, 1e9, 1e10, 1e11)


def hours(figures: dict[str, Any]) -> dict[str, float]:
    pace = figures["tokens_per_second"]
    amounts = {"20 per parameter": TOKENS_PER_PARAMETER * figures["parameters"]} | {
        f"{tokens:.0e}": tokens for tokens in GRID
    }
    return {name: tokens / pace / 3600 for name, tokens in amounts.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    columns = ["20 per parameter", *(f"{tokens:.0e}" for tokens in GRID)]
    lines = [
        "| parameters | tokens/s | MFU | peak GiB | "
        + " | ".join(f"GPU hours, {column} tokens" for column in columns)
        + " |"
    ]
    lines.append("|" + "--:|" * (4 + len(columns)))
    for row in results.values():
        if "error" not in row:
            cells = [f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}", row["mfu"] and f"{row['mfu']:.1%}"]
            cells += [row["peak_gpu_memory_gib"], *(f"{row['hours'][name]:,.3g}" for name in columns)]
            lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(MODES), default=[name for name in MODES if name != "tiny"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--rows", type=int, help="rows of a step, instead of the shapes' own")
    parser.add_argument("--limit_seconds", type=float, default=150, help="longest time of one run")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    result = about() | {"device": args.device, "torch_compile": args.torch_compile, "results": results}
    with tempfile.TemporaryDirectory(prefix="sizes-") as folder:
        workshop = Workshop(Path(folder), args.device, args.torch_compile)
        for name in args.shapes:
            mode = dataclasses.replace(MODES[name], rows=args.rows or MODES[name].rows)
            results[name] = figures = run(workshop, name, mode, 1, args.limit_seconds)
            figures |= (
                {} if "error" in figures else {"rows": mode.rows, "tokens": mode.tokens, "hours": hours(figures)}
            )
            print(f"{name}: {rounded(figures)}", file=sys.stderr, flush=True)
            if args.output:
                args.output.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rounded(result), indent=1), table(results), sep="\n\n")
    sys.exit(any("error" in figures for figures in results.values()))


if __name__ == "__main__":
    main()
