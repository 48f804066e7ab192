"""Support for FSDP2 and DeepSpeed that Trainer and accelerate do not provide."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl.models.utils import prepare_fsdp, unwrap_model_for_generation


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Return the settings of FSDP, if the run uses it. (The state has no such attribute otherwise.)"""
    return getattr(accelerator.state, "fsdp_plugin", None)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether the run uses DeepSpeed."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


@contextlib.contextmanager
def policy_for_generation(model: nn.Module, accelerator: Accelerator, gather: bool) -> Iterator[nn.Module]:
    """Give the policy-and-critic module without wrappers, ready for `generate`.

    Args:
        model: as it is trained, with wrappers or without.
        gather: keep the policy's complete weights in the block (ZeRO-3, FSDP2): they are gathered once per rollout,
            not a layer at a time for every token. The critic's layers stay in shards.

    Raises:
        ValueError: with FSDP2, before `train()`.
    """
    with unwrap_model_for_generation(model, accelerator, gather_deepspeed3_params=gather) as bare:
        if accelerator.is_fsdp2 and not isinstance(bare, FSDPModule):
            raise ValueError("FSDP2 shards the model in train(); evaluate or sample during or after it, not before")
        layers = [module for module in bare.policy.modules() if isinstance(module, FSDPModule)] if gather else []
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        if layers and accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        try:
            yield bare
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(
                    accelerator.state.fsdp_plugin.reshard_after_forward is True, recurse=False
                )
                layer.reshard()


def exact_outputs(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keep log-probs and values in float32 under mixed precision, and sum gradients in float32.

    accelerate lets FSDP2 cast a model's outputs. Log-probs in bf16 have errors of some hundredths of a nat, as large
    as the differences that PPO measures. (transformers uses the same policy for FSDP2.)
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def complete(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Move a frozen model to this process's device, with the weights of the first process.

    Under `fsdp_cpu_ram_efficient_loading` transformers (5.17 for example) reads weights only on each host's first
    process and leaves zeros on the others. accelerate sends the weights only for models that it prepares, and it does
    not prepare frozen models.
    """
    model.to(accelerator.device)
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        for tensor in model.state_dict().values():
            broadcast(tensor)
    return model


def shard_frozen(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Shard a frozen model layer by layer. trl's `prepare_fsdp` alone would gather the complete model at once."""
    names = set(model._no_split_modules or ())
    for layer in [module for module in model.modules() if type(module).__name__ in names]:
        prepare_fsdp(layer, accelerator)
    return prepare_fsdp(model, accelerator)
