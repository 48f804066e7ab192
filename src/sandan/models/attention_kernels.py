"""Which kernels `scaled_dot_product_attention` may use."""

import torch


def avoid_cudnn_attention() -> None:
    """Keep PyTorch from cuDNN's attention, in this process.

    With a mask, in bf16, on H100 and H200, the backward pass of cuDNN's kernel gives NaN where the length is 64 more
    than a multiple of 128 and all of a row's scores are low. PyTorch takes it by default from 2.11 on
    (https://github.com/pytorch/pytorch/issues/196678). Seen in PPO of SmolLM2-135M-Instruct: the loss was finite, and
    at length 320 the critic's gradient was not. Pretraining takes it all the same: its blocks have no mask.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
