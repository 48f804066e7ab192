"""`step` on two processes of the CPU (gloo) makes the update of one process that has the rows of both."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.scripts import run_on_two_ranks, run_processes
from helpers.tiny_ppo import make_policy, make_tokenizer

import sandan.legacy.trainer
from sandan.legacy import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model


ROWS = 8


def two_steps(folder):
    """Make two steps on this process's share of the rows, and keep weights and numbers of the first process."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    share = ROWS // world
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randint(3, 64, (3 + row % 3,), generator=generator) for row in range(ROWS)]
    responses = [torch.randint(3, 64, (3 + row * 5 % 7,), generator=generator) for row in range(ROWS)]
    scores = torch.randn(ROWS, generator=generator)
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_policy())
    reference = create_reference_model(model)
    for parameter in reference.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    config = PPOConfig(
        batch_size=share,
        mini_batch_size=share // 2,
        gradient_accumulation_steps=2,
        whiten_rewards=True,
        use_score_scaling=True,
        max_grad_norm=0.5,
        accelerator_kwargs={"cpu": True},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = PPOTrainer(config, model, reference, make_tokenizer(), optimizer=optimizer)
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(2):
        stats = trainer.step(queries[mine], responses[mine], scores[mine])
    trainer.log_stats(stats, {"query": [], "response": []}, scores[mine])
    trainer.save_pretrained(folder / "out")
    numbers = {name: value for name, value in stats.items() if name.startswith(("ppo", "objective"))}
    if rank == 0:
        numbers = {name: value for name, value in numbers.items() if isinstance(value, float)}
        weights = [parameter.detach() for parameter in model.parameters()]
        torch.save((numbers, weights), folder / f"{world}.pt")
    trainer.accelerator.wait_for_everyone()
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path):
    for run in (partial(run_processes, [{}], timeout=180), run_on_two_ranks):
        done = run(__file__, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    (numbers, weights), (others, other_weights) = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert len(numbers) > 20
    torch.testing.assert_close(others, numbers, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other_weights, weights, atol=1e-6, rtol=1e-5)
    assert (tmp_path / "out" / "model.safetensors").is_file()


if __name__ == "__main__":
    # The rows of an optimizer step must be the same in one process and in two.
    sandan.legacy.trainer.shuffled = lambda rows, *seeds: torch.arange(rows)
    two_steps(Path(sys.argv[1]))
