"""What a checkpoint of PPO holds beside Trainer's."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..trainer import ReliableTrainer
from .ema import EMA_FOLDER
from .modules import load_weights, mark_special_tokens, save_policy


VALUE_MODEL_FOLDER = "value_model"
STATE_FILE = "ppo_state.json"


class ResumableTrainer(ReliableTrainer):
    """The part of `PPOTrainer` that saves, and goes on exactly where a checkpoint was saved."""

    state_file = STATE_FILE
    # Means of the updates since the last log; `PPOTrainer` fills it.
    _history: list[dict[str, float]]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The policy at the root, the critic in `value_model/`, both plain `from_pretrained` folders.

        No `training_args.bin`: it is a pickle, holds `hub_token` in clear, and nothing reads it.

        Args:
            state_dict: of the wrapper, where the weights had to be gathered from shards.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        wrapper = self.accelerator.unwrap_model(self.model)
        mark_special_tokens(wrapper.policy, self.processing_class, self.stop_token_id)

        def part(name: str) -> dict[str, torch.Tensor] | None:
            return state_dict and {
                key.removeprefix(name): value for key, value in state_dict.items() if key.startswith(name)
            }

        save_policy(wrapper.policy, folder, part("policy."))
        wrapper.value_model.save_pretrained(folder / VALUE_MODEL_FOLDER, state_dict=part("value_model."))
        self.processing_class.save_pretrained(folder)
        if self.policy_average is not None:
            self.policy_average.save(folder)
            self.processing_class.save_pretrained(folder / EMA_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.is_deepspeed_enabled:
            load_weights(self.policy_model, Path(resume_from_checkpoint))
            load_weights(self.value_model, Path(resume_from_checkpoint, VALUE_MODEL_FOLDER))
            if self.policy_average is not None:
                self.policy_average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        if self.vllm is not None:
            self.vllm.synced_step = None  # other weights, at the same step

    def _run_state(self) -> dict[str, Any]:
        centers = {"reward_center": self.reward_center, "value_center": self.value_center}
        state = super()._run_state() | {"kl_coef": self.kl_coef, **centers}
        return state | ({"score_moments": self.score_moments} if self.args.scale_scores else {})

    def _set_run_state(self, state: dict[str, Any]) -> None:
        super()._set_run_state(state)
        self.kl_coef, self.reward_center = state["kl_coef"], state["reward_center"]
        self.value_center = state["value_center"]
        self.score_moments = tuple(state.get("score_moments", self.score_moments))
        self.state.episode = self.state.global_step // self.steps_per_update * self.args.batch_size

    def _unlogged_metrics(self) -> dict[str, Any]:
        return {"updates": self._history}

    def _restore_metrics(self, unlogged: dict[str, Any]) -> None:
        self._history = unlogged["updates"]
