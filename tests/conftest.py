"""A tokenizer and a model small enough to build in code."""

import os

import pytest
from helpers import OFFLINE, ROOT, TEXTS


pytest_plugins = ["helpers.tiny_ppo", "helpers.browser"]


os.environ.update(OFFLINE)
# For processes that tests start: the code under test, and the helpers.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


# Minutes each: begun first, so that no core waits for the other one at the end.
LONG = (
    "test_chain.py",
    "test_seed_examples.py",
    "test_zoo.py",
    "test_checkpoints.py",
    "test_docs.py",
    "test_distributed.py",
)


def pytest_collection_modifyitems(items):
    """Sort the files that take long to the front; within a file the order stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_report_header():
    """Say what a red run depends on, so that it can be repeated on another machine."""
    import torch

    kernels, threads = torch.backends.cpu.get_cpu_capability(), os.environ["OMP_NUM_THREADS"]
    again = f"ATEN_CPU_CAPABILITY={kernels.lower()} OMP_NUM_THREADS={threads}"
    return [
        f"processor: {kernels} kernels of torch {torch.__version__}, {os.cpu_count()} cores; repeat it with {again}",
        "seeds of the embedded chain: 42 in trainers, 0 elsewhere; `make demo SEED=1` sets another one in all",
    ]


@pytest.fixture(scope="session", autouse=True)
def own_dataset_cache(tmp_path_factory):
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def tokenizer():
    from sandan.pretrain.tokenizer import train_tokenizer

    return train_tokenizer(TEXTS * 20, vocab_size=320)


@pytest.fixture(scope="session")
def tiny_config(tokenizer):
    """Sizes of a two-layer Llama with the tokenizer's vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
        num_labels=1,
    )


@pytest.fixture
def model(tiny_config):
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config).eval()
