"""Faster training of SFT and the reward model on a GPU: no padding, compiled layers, a bfloat16 residual stream.

None of this changes what is learned: each row sees the same tokens as with padding, and each step has the same rows.
"""

import logging
from typing import Any

from accelerate.utils import DynamoBackend, is_peft_model
from transformers import PreTrainedModel

from ..models.layer_compilation import compile_layers
from ..models.residual_stream import keep_residual_stream_narrow
from ..models.unpadded_attention import obstacle, use_varlen
from .trainer import GuardedTrlTrainer


logger = logging.getLogger(__name__)


class FlatTrainer(GuardedTrlTrainer):
    """[`GuardedTrlTrainer`] whose batches are one row `(1, tokens)`, if the model allows it.

    Attributes:
        flat (`bool`): whether batches are without padding.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        keep_residual_stream_narrow(self.model)
        reason = self._flat_obstacle()
        self.flat = reason is None
        if self.flat:
            use_varlen(self._base_model())
        else:
            logger.info("batches are padded, which is slower: %s", reason)
        if self.args.torch_compile:
            # Compile only the layers: a whole model takes minutes, and each new length takes another compilation.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            compile_layers(self.model, dynamic=True)

    def _base_model(self) -> PreTrainedModel:
        """Return the model without its adapters."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _flat_obstacle(self) -> str | None:
        """Return the reason why batches of this run must be padded, or None."""
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or getattr(parallelism, "sp_enabled", False)):
            return "rows are split among devices"
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            return "PEFT puts virtual tokens before each row"
        return obstacle(self._base_model())
