"""Import the packages on which the scripts spend their first seconds, for the process that stages are forked from."""

import datasets  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.modernbert.modeling_modernbert  # noqa: F401
import trl.trainer.reward_trainer
import trl.trainer.sft_trainer  # noqa: F401

import sandan.evaluate.comparison
import sandan.ppo.trainer
import sandan.report.build
import sandan.reward.metrics  # noqa: F401
