"""Fast sampling on a GPU: one forward pass per token over a static key-value cache, replayed as one CUDA graph.

`generate` starts about a thousand kernels per token from Python, which takes most of the time with a small model, and
it reads keys and values once per query head. Here a step (forward pass, sampling, bookkeeping) is recorded once and
replayed without Python; query heads that share a key head read it together; the host checks the sampled tokens only
every `LOOK_EVERY_TOKENS` tokens.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


ATTENTION = "sandan_grouped_decode"
# Prompts are padded to a multiple of this length, so that only a few shapes have to be recorded.
PROMPT_STEP_TOKENS = 64
# The host checks once per this many tokens if every answer has ended.
LOOK_EVERY_TOKENS = 16


def grouped_decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention for a single new token, with the query heads of one key head as rows of one matrix product.

    Args:
        query `(B, H, Q, D)`, key and value `(B, K, S, D)` with K key heads for H query heads, attention_mask
            `(B, 1, Q, S)`.

    Returns:
        `(B, Q, H, D)` and None, as transformers' attention functions do.
    """
    batch, heads, queries, width = query.shape
    key_heads = key.shape[1]
    if queries > 1 or heads == key_heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query = query.reshape(batch, key_heads, heads // key_heads, width)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(batch, 1, heads, width), None


AttentionInterface.register(ATTENTION, grouped_decode_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def obstacle(model: nn.Module) -> str | None:
    """Return the reason why this module cannot sample from a model, or None if it can."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel) or not getattr(base, "_can_compile_fullgraph", False):
        return f"{type(base).__name__} does not work with a static cache"
    config = base.config.get_text_config()
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    if set(getattr(config, "layer_types", None) or [window]) != {"full_attention"}:
        return f"{type(base).__name__} has layers without full attention"
    if getattr(base, "is_quantized", False):
        return "the weights are quantized"
    return None


def draw(logits: torch.Tensor, bias: torch.Tensor, temperature: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Sample from softmax(logits / temperature) by the Gumbel-max trick, or greedily without noise.

    Args:
        logits (`(B, V)`), bias (`(V,)`): the bias is added to the logits; -inf for tokens that are never sampled.
        noise (`(B, V)`): independent draws of an exponential distribution; -log of a draw is Gumbel distributed.

    Returns:
        Token ids, `(B,)`.
    """
    logits = logits.float() + bias
    return (logits if noise is None else logits / temperature - noise.log()).argmax(-1)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Return the complete weight: gathered from all processes if FSDP2 holds it in shards, else unchanged."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Decoder:
    """Sampler with its own copy of a policy; [`load`] copies the policy's weights into it.

    Args:
        policy: the model that is trained, or a PEFT model (its active adapter is merged into the copy).
        rows: answers sampled at once.
        new_tokens: maximum number of tokens of an answer.
        dtype: of the copy.
        compiled: compile a step before it is recorded: faster steps, half a minute more at the start.
        device: of the copy; by default the policy's.

    Raises:
        ValueError: if this module cannot sample from the model (see [`obstacle`]).
    """

    def __init__(
        self,
        policy: nn.Module,
        rows: int,
        new_tokens: int,
        dtype: torch.dtype,
        compiled: bool = False,
        device: torch.device | None = None,
    ):
        if reason := obstacle(policy):
            raise ValueError(reason)
        self.rows, self.new_tokens, self.compiled = rows, new_tokens, compiled
        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        self.device = device or next(policy.parameters()).device
        config = copy.deepcopy(base.config)
        config._attn_implementation = ATTENTION
        with torch.device(self.device):
            self.model = type(base)._from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.prompt_tokens = 0
        self.settings: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None
        self.replay: Callable[[], None] | None = None

    @torch.no_grad()
    def load(self, policy: nn.Module) -> None:
        """Copy the policy's weights, with adapters merged, in place, so that the recorded graph reads the new weights.

        Weights in shards are gathered one at a time, so all processes must call this.
        """
        adapter = policy.active_adapter if isinstance(policy, PeftModel) else None
        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        targets = dict(self.model.named_parameters())
        for name, module in base.named_modules():
            if isinstance(module, BaseTunerLayer):
                weight = module.get_base_layer().weight
                targets.pop(f"{name}.weight").copy_(whole(weight + module.get_delta_weight(adapter).to(weight.dtype)))
        for name, parameter in base.named_parameters():
            target = targets.pop(name.replace(".base_layer.", "."), None)
            if target is not None:
                target.copy_(whole(parameter))
        if targets:
            raise ValueError(f"no weights for {', '.join(targets)}")

    @torch.no_grad()
    def sample(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        temperature: float,
        stop_token_ids: Sequence[int],
        suppressed: Sequence[int] = (),
    ) -> torch.Tensor:
        """Sample answers to left-padded prompts, with the default random generator of the device.

        Args:
            input_ids, attention_mask (`(B, P)`), with B at most `rows`.
            temperature: 0 is greedy.
            suppressed: ids that are never sampled.

        Returns:
            `(B, new_tokens)`; positions after the stop token are filled with the first of them.
        """
        batch, width = input_ids.shape
        settings = (temperature, tuple(stop_token_ids), tuple(suppressed))
        if width > self.prompt_tokens or settings != self.settings:
            self.settings = settings
            self._allocate(max(-(-width // PROMPT_STEP_TOKENS) * PROMPT_STEP_TOKENS, self.prompt_tokens))
        self._prefill(input_ids, attention_mask)
        for done in range(1, self.new_tokens):
            if done % LOOK_EVERY_TOKENS == 0 and bool(self.finished[:batch].all()):
                break
            self._next()
        return self.answers[:batch].clone()

    def _allocate(self, prompt_tokens: int) -> None:
        """Allocate buffers for prompts of this length, and drop the graph that was recorded for shorter prompts."""
        rows, device = self.rows, self.device
        self.prompt_tokens, self.replay = prompt_tokens, None
        total = prompt_tokens + self.new_tokens
        self.cache = StaticCache(config=self.model.config, max_cache_len=total)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(rows, 1, 1, total, dtype=torch.bool, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.answers = torch.zeros(rows, self.new_tokens, dtype=torch.long, device=device)
        self.done = torch.zeros(1, dtype=torch.long, device=device)
        self.stops = torch.tensor(self.settings[1], device=device)
        vocabulary = self.model.get_output_embeddings().out_features
        self.bias = torch.zeros(vocabulary, device=device)
        self.bias[[token for token in self.settings[2] if token < vocabulary]] = -torch.inf

    def _prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Read the prompts and draw the first token of each answer."""
        batch, width = input_ids.shape
        ids = torch.zeros(self.rows, self.prompt_tokens, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        ids[:batch, -width:], mask[:batch, -width:] = input_ids, attention_mask
        # Unused rows see one token, so that attention has at least one token in every row.
        mask[batch:, -1] = 1
        self.cache.reset()
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.visible.zero_()
        self.visible[:, 0, 0, : self.prompt_tokens] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True))
        self.finished.zero_()
        self.finished[batch:] = True
        self.answers.fill_(self.settings[1][0])
        self.done.zero_()
        self._take(logits)

    def _take(self, logits: torch.Tensor) -> None:
        """Draw a token for each row from its logits `(B, V)` and store it in the buffers."""
        temperature, (filler, *_), _ = self.settings
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_() if temperature else None
        drawn = draw(logits, self.bias, temperature, noise).masked_fill(self.finished, filler)
        self.answers.index_copy_(1, self.done, drawn[:, None])
        self.finished.logical_or_((drawn[:, None] == self.stops).any(1))
        self.tokens.copy_(drawn[:, None])
        self.visible.index_fill_(3, self.prompt_tokens + self.done, True)
        self.done.add_(1)

    def _step(self) -> None:
        """Read the tokens drawn last and draw the next ones."""
        logits = self.model(
            input_ids=self.tokens,
            attention_mask=self.visible,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.positions.add_(1)
        self._take(logits)

    def _next(self) -> None:
        if self.device.type != "cuda":
            self._step()
            return
        if self.replay is None:
            self.replay = self._record()
        self.replay()

    def _record(self) -> Callable[[], None]:
        """Record a step as a CUDA graph. Recording runs the step; the buffers are restored afterwards."""
        step = torch.compile(self._step, fullgraph=True) if self.compiled else self._step
        lengths = [layer.cumulative_length for layer in self.cache.layers]
        state = [self.tokens, self.positions, self.visible, self.finished, self.answers, self.done, *lengths]
        before = [tensor.clone() for tensor in state]
        restore = functools.partial(torch._foreach_copy_, state, before)
        random_state = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        torch.cuda.set_rng_state(random_state, self.device)
        restore()
        return graph.replay
