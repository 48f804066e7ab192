"""Metrics of PPO updates, under TRL's names."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerState

from .collapse import answer_figures
from .config import PPOConfig
from .experience import Experience
from .formulas import explained_variance, masked_sum
from .reduction import OverRanks
from .rewards import Reward
from .rollout import INPUT_IDS
from .vllm_sampler import sampling_difference


class UpdateMetrics:
    """Collector of the metrics of each update.

    Attributes:
        current (`dict`): metrics of the current update.
        history (`list`): metrics of the updates since the last log.
        steps_taken (`int`): optimizer steps that the current update has really made.
    """

    def __init__(self, args: PPOConfig, over_ranks: OverRanks):
        self.args, self.over_ranks = args, over_ranks
        self.device = over_ranks.accelerator.device
        self.current: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.steps_taken = 0
        self.sums: dict[str, torch.Tensor] = {}
        # Approximate KL and tokens of the current optimizer step.
        self._step = torch.zeros(2, device=self.device)
        self._pace: tuple[float, int] | None = None
        self._shown: dict[str, float] | None = None

    # ---- An update, in the order of the calls ----

    def begin(self, episodes_before: int) -> None:
        """Begin an update, and start the clock of its rollout.

        Args:
            episodes_before: episodes of the run before this update.
        """
        self._rollout_started = time.perf_counter()
        self._pace = self._pace or (self._rollout_started, episodes_before)
        self.current = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the seconds of a block."""
        started = time.perf_counter()
        yield
        self.current[name] = time.perf_counter() - started

    def add_rollout(
        self,
        experience: Experience,
        scores_before: torch.Tensor,
        components: torch.Tensor,
        rewards: Sequence[Reward],
        kl_coef: float,
    ) -> None:
        """Add the metrics that are known before the first optimizer step.

        Args:
            scores_before (`(B,)`): scores before penalties.
            components (`(B, rewards)`): scores of each reward.
        """
        mean, rollout, mask = self.over_ranks.mean, experience.rollout, experience.policy_mask
        kl = experience.kl.sum(1)
        mean_kl, non_score = mean(kl), mean(-kl_coef * kl)
        mean_score, stopped = mean(experience.scores), rollout.stopped(self.device)
        # Different answers can only be counted over all ranks together.
        asked = [tuple(row[INPUT_IDS]) for row in rollout.rows]
        pairs = gather_object(
            [(prompt, answer.token_ids) for prompt, answer in zip(asked, rollout.completions, strict=True)]
        )
        figures = answer_figures(*zip(*pairs, strict=True))
        self.current |= {
            "objective/kl": mean_kl,
            "objective/entropy": mean((-experience.logprobs).masked_fill(~mask, 0).sum(1)),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": mean_score + non_score,
            "objective/scores": mean_score,
            "objective/scores_before_penalty": mean(scores_before),
            "objective/kl_coef": kl_coef,
            "val/num_eos_tokens": self.over_ranks.sum(stopped.sum()).item(),
            "val/stopped_share": mean(stopped.float()),
            "val/response_tokens": mean(rollout.lengths(self.device).float()),
            **{f"val/{name}": figure for name, figure in figures.items()},
            "val/explained_variance": explained_variance(
                experience.values, experience.returns, experience.value_mask, self.over_ranks.sum
            ).item(),
        }
        for reward, column in zip(rewards, components.T, strict=True):
            self.current[f"rewards/{reward.name}"] = mean(column)
        self.current |= sampling_difference(rollout, experience.logprobs, mask, self.over_ranks.accelerator)
        if experience.weights is not None:
            weight = masked_sum(experience.weights, mask)
            capped = masked_sum((experience.weights >= self.args.importance_cap).float(), mask)
            weight, capped, tokens = self.over_ranks.sum(torch.stack([weight, capped, mask.sum()])).tolist()
            self.current |= {
                "sampling/importance_weight/mean": weight / tokens,
                "sampling/importance_weight/capped_share": capped / tokens,
            }
        if rollout.gather_seconds is not None:
            self.current["time/gather_seconds"] = rollout.gather_seconds

    def begin_steps(self) -> None:
        """Begin the optimizer steps of the update."""
        self._update_started = time.perf_counter()
        self.sums = defaultdict(lambda: torch.zeros((), device=self.device))
        self._step.zero_()
        self.steps_taken = 0

    @torch.no_grad()
    def add_micro_batch(
        self,
        inputs: dict[str, torch.Tensor],
        losses: dict[str, torch.Tensor],
        logprobs: torch.Tensor,
        ratio: torch.Tensor,
        policy_clipped: torch.Tensor,
        value_clipped: torch.Tensor,
    ) -> None:
        """Add the sums over the tokens of a micro-batch.

        Args:
            losses: sums over tokens that were computed for the loss, by name.
            logprobs, ratio, policy_clipped, value_clipped: `(B, T)`.
        """
        mask, value_mask = inputs["old_policy_mask"], inputs["old_value_mask"]
        change = logprobs - inputs["old_logprobs"]
        sums = losses | {
            "tokens": mask.sum(),
            "value_tokens": value_mask.sum(),
            "policy/approxkl_avg": masked_sum(change.square() / 2, mask),
            "policy/clipfrac_avg": masked_sum(policy_clipped.float(), mask),
            "val/clipfrac_avg": masked_sum(value_clipped.float(), value_mask),
            "val/ratio": masked_sum(ratio, mask),
            "val/ratio_var": masked_sum((ratio - 1).square(), mask),
        }
        for name, total in sums.items():
            self.sums[name] += total.detach()
        self._step += torch.stack([sums[name].detach().float() for name in ("policy/approxkl_avg", "tokens")])

    def step_approx_kl(self) -> float:
        """Return the approximate KL of the current optimizer step, in nats per token, and reset it for the next."""
        approx_kl, tokens = self.over_ranks.sum(self._step).tolist()
        self._step.zero_()
        return approx_kl / tokens

    def so_far(self, episodes: int) -> dict[str, float]:
        """Return the metrics of the current update: its means over the tokens of all ranks and of its steps so far.

        Args:
            episodes: of the run, with this update.
        """
        names = sorted(self.sums)
        sums = self.over_ranks.sum(torch.stack([self.sums[name].float() for name in names]))
        totals = dict(zip(names, sums.tolist(), strict=True))
        tokens, value_tokens = totals.pop("tokens"), totals.pop("value_tokens")
        metrics = dict(self.current)
        for name, total in totals.items():
            over_value_mask = name in ("loss/value_avg", "val/clipfrac_avg")
            metrics[name] = total / (value_tokens if over_value_mask else tokens)
        # Deviations are from 1, not from 0, so that rounding does not hide a small variance.
        metrics["val/ratio_var"] = max(metrics["val/ratio_var"] - (metrics["val/ratio"] - 1) ** 2, 0.0)
        started, episodes_before = self._pace
        metrics["eps"] = (episodes - episodes_before) / (time.perf_counter() - started)
        metrics["episode"] = episodes
        return metrics

    def show(self, state: TrainerState, learning_rate: float) -> None:
        """Show the metrics so far as the last entry of `state.log_history`, until [`hide`].

        TRL logs before `on_step_end`, once an update, and its users' callbacks read the last entry there.
        """
        self.hide(state)
        self._shown = self.so_far(state.episode) | {"lr": learning_rate, "step": state.global_step + 1}
        state.log_history.append(self._shown)

    def hide(self, state: TrainerState) -> None:
        """Take the entry of [`show`] away: the log of the update takes its place."""
        state.log_history[:] = [entry for entry in state.log_history if entry is not self._shown]
        self._shown = None

    def finish(self, episodes: int) -> dict[str, float]:
        """Return the metrics of the update, with its speed."""
        metrics, now = self.so_far(episodes), time.perf_counter()
        metrics["time/update_seconds"] = now - self._update_started
        tokens_sampled = metrics["val/response_tokens"] * self.args.batch_size
        metrics["time/tokens_per_second"] = tokens_sampled / (now - self._rollout_started)
        if self.args.max_approx_kl:
            metrics["policy/epochs_used"] = self.steps_taken / self.args.num_mini_batches
        self.history.append(metrics)
        return metrics

    # ---- Between updates ----

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Add the means of the updates since the last log to Trainer's log of a training step."""
        if "loss" not in logs or not self.history:
            return
        last, count = self.history[-1], len(self.history)
        means = {name: sum(update[name] for update in self.history) / count for name in last}
        logs |= means | {"eps": last["eps"], "episode": last["episode"], "lr": logs["learning_rate"]}
        self.history.clear()

    def restart_clock(self) -> None:
        """Restart the measurement of the speed, `eps`, for a new run."""
        self._pace = None

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics that were not logged yet, in JSON types."""
        return {"updates": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of [`state_dict`]."""
        self.history = state["updates"]
