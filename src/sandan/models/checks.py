"""Checks of models before anything is trained: positions, direction, score head, and whether they can be saved again."""

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from .loading import first_line, forget_code, load_classifier


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Kinds of model that number positions from behind the pad token's id.
COUNT_FROM_PAD = [
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
# Tokens of the probe, and the share of the largest logit by which rounding may change an earlier one.
PROBE_TOKENS, ROUNDING = 6, 1e-4


# ---- Positions ----


def positions_of(config: "PretrainedConfig") -> int | None:
    """Return the most tokens that a row may have, or None if the model has no such limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if text.model_type in COUNT_FROM_PAD:
        return positions - (text.pad_token_id or 0) - 1
    return max([positions, *(round(length) for length in _stretched(text, positions))])


def _stretched(config: "PretrainedConfig", positions: int) -> list[float]:
    """Return the lengths to which rotary positions are stretched, one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return [
        (kind.get("original_max_position_embeddings") or positions) * kind["factor"]
        for kind in kinds
        if kind.get("factor") and kind.get("rope_type") in ("linear", "dynamic", "yarn")
    ]


def check_length(key: str, tokens: int, config: "PretrainedConfig", path: str) -> None:
    """Refuse an option of `tokens` tokens if the model at `path` has fewer positions.

    Raises:
        UserError: with both numbers.
    """
    positions = positions_of(config)
    if positions is not None and tokens > positions:
        raise UserError(f"{key}: {tokens:,} tokens, but {path} has {positions:,} positions; give at most {positions}")


def check_prompts(
    lengths: Sequence[int], new_tokens: int, key: str, config: "PretrainedConfig", path: str, limit: str | None = None
) -> None:
    """Refuse prompts that leave no room for an answer in the positions of the model at `path`.

    Args:
        lengths: of the prompts, in tokens.
        new_tokens: the most tokens of an answer, the option `key`.
        limit: the option that leaves out longer prompts, if the stage has one.

    Raises:
        UserError: with both numbers.
    """
    positions, longest = positions_of(config), max(lengths, default=0)
    if positions is None or longest + new_tokens <= positions:
        return
    room = positions - new_tokens
    if room < 1:
        fix = f"lower {key}"
    else:
        fix = f"{f'give {limit} {room}' if limit else 'take shorter prompts'} or lower {key}"
    raise UserError(
        f"{key}: the longest prompt has {longest:,} tokens and the answer up to {new_tokens:,}: "
        f"{longest + new_tokens:,} tokens, but {path} has {positions:,} positions; {fix}"
    )


def config_of(path: str, revision: str | None = None) -> "PretrainedConfig | None":
    """Return the configuration at `path`, or None if there is none that can be read (loading the model says why)."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fit_max_length(args: Any, path: str, given: bool, revision: str | None = None) -> None:
    """Check `args.max_length` against the model at `path`; if it is not given, lower it to the model's positions.

    Raises:
        UserError: if it is given and the model has fewer positions.
    """
    config = config_of(path, revision)
    positions = None if config is None else positions_of(config)
    if positions is None or (args.max_length is not None and args.max_length <= positions):
        return
    if given and args.max_length is not None:
        check_length("max_length", args.max_length, config, path)
    args.max_length = positions
    logger.info("max_length: %s, the positions of %s", f"{positions:,}", path)


# ---- Direction ----


def sees_later_tokens(model: "PreTrainedModel") -> bool:
    """Return whether a change of the last token changes an earlier logit. False for a model without weights in memory."""
    import torch

    first = next(model.parameters())
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=first.device).remainder(vocabulary).repeat(2, 1)
    ids[1, -1] = vocabulary - 1
    training, config = model.training, model.config.get_text_config()
    use_cache, config.use_cache = getattr(config, "use_cache", None), False
    model.eval()
    with torch.no_grad():
        one, other = (model(input_ids=row[None]).logits[0, :-1].float() for row in ids)
    model.train(training)
    config.use_cache = use_cache
    return bool((one - other).abs().max() > ROUNDING * one.abs().max())


def check_direction(model: "PreTrainedModel", path: str) -> None:
    """Refuse a language model that sees later tokens: it would learn to copy them, and could not write.

    Raises:
        UserError: naming the fix.
    """
    if sees_later_tokens(model):
        kind = model.config.model_type
        encoder = getattr(model.config, "is_decoder", None) is False
        raise UserError(
            f"{path}: {kind} sees later tokens, so it cannot learn to predict them; take "
            f"{'is_decoder: true, ' if encoder else ''}objective: mlm, or a causal model_type such as llama"
        )


# ---- Saving ----


def savable_generation(config: "GenerationConfig", path: str) -> "GenerationConfig":
    """Return a generation config that `save_pretrained` takes: the given one, or a copy with `do_sample: true`.

    Raises:
        UserError: if it is refused for another reason than sampling settings without sampling.
    """
    repaired = copy.deepcopy(config)
    repaired.do_sample = True
    problems = []
    for candidate in (config, repaired):
        try:
            candidate.validate(strict=True)
        except ValueError as error:
            problems.append(error)
            continue
        if candidate is repaired:
            logger.warning("%s: generation_config.json: do_sample: set to true, as its sampling settings ask", path)
        return candidate
    raise UserError(f"{path}: generation_config.json: cannot be saved again: {first_line(problems[0])}") from problems[
        0
    ]


def savable_at(path: str) -> None:
    """Check the generation settings at `path`, if there are any, as [`savable_generation`]."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):
        return
    savable_generation(config, path)


def make_savable(model: "PreTrainedModel", path: str) -> None:
    """Repair the model's generation settings if `save_pretrained` would refuse them, and try to save both configs.

    Entries that name code are removed from both.

    Raises:
        UserError: if the trained model could not be saved.
    """
    forget_code(model)
    if model.can_generate():
        model.generation_config = savable_generation(model.generation_config, path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise UserError(f"{path}: cannot be saved again: {first_line(error)}") from error


# ---- Score head ----


def check_reward_folder(path: str, key: str = "reward_model_path") -> None:
    """Refuse a reward model without its head, by the names of its weights: their values are not loaded.

    Raises:
        UserError: as [`load_classifier`].
    """
    load_classifier(path, key, device_map={"": "meta"})
