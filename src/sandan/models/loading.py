"""Load tokenizers and models from an earlier stage's folder or the Hub, with checks that TRL does not make."""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.places import command_for
from ..core.stage import Stage
from .tokens import ensure_pad_token


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

# No Python file of a model's folder or of the Hub is run, and no pickle is read, which could run code too.
NO_CODE = {"trust_remote_code": False}
SAFE = {"use_safetensors": True, **NO_CODE}
# Options of `from_pretrained` that say where a model's files are, and those by which it would read unchecked ones.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
UNCHECKED = ("gguf_file", "variant", "adapter_kwargs", "allow_all_kernels", "weights_only")
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
# Settings by which PEFT reads a pickle, loads more adapters, or imports a module that the adapter names.
ADAPTER_READS = ("prompt_tuning_init_state_dict_path", "adapters", "megatron_config")
ONLY = (
    "only safetensors of the same folder are read, as pickles (.bin, .pt) can run code; save the model again as such"
)
# Entries of a model's settings that name Python files of its folder or of the Hub.
CODE_ENTRIES = ("auto_map", "custom_pipelines")


def require_model(path: str | None, stage: Stage, key: str = "model_name_or_path") -> str:
    """Check that `path` is a model or tokenizer folder (recorded in the lineage) or looks like a Hub name.

    Raises:
        UserError: if it is missing, or a local path that is not such a folder.
    """
    if not path:
        raise UserError(f"{key}: missing; name an earlier stage's folder or a Hub model")
    folder = Path(path)
    if folder.is_dir():
        if folder.resolve() == stage.output_dir.resolve():
            raise UserError(
                f"{path}: {key}: is the output_dir too; the model would be overwritten by its own successor"
            )
        # First: that its stage did not finish says more than that a file of it is missing.
        stage.add_input(folder)
        if key.startswith("tokenizer"):
            wanted = ("tokenizer_config.json", "config.json")
        else:
            wanted = ("config.json", "adapter_config.json")
        if not any((folder / name).is_file() for name in wanted):
            raise UserError(f"{path}: {key}: no {wanted[0]} in it; another folder, or its stage did not finish")
    else:
        refuse_missing_folder(path, key)
        stage.inputs[f"hub:{path}"] = "not hashed (Hub name)"
    return path


def refuse_missing_folder(path: str, key: str) -> None:
    """Raise [`UserError`] if a path that is no folder does not look like a Hub name either."""
    folder = Path(path)
    if folder.parts[0] == "outputs" or path[0] in "./~" or len(folder.parts) > 2:
        hint = f"; run `{command_for(folder.name, folder.parent.name)}` first" if folder.parts[0] == "outputs" else ""
        raise UserError(f"{path}: {key}: no such folder{hint}")


def load_tokenizer(path: str, revision: str = "main", padding_side: str = "right") -> "PreTrainedTokenizerBase":
    """Load an `AutoTokenizer` and make sure that it has a pad token.

    Raises:
        UserError: if there is no tokenizer at `path`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, padding_side=padding_side, **NO_CODE)
    except Exception as error:  # the Rust tokenizers raise bare exceptions
        raise UserError(f"{path}: no tokenizer can be loaded: {first_line(error)}") from error
    ensure_pad_token(tokenizer)
    for name in CODE_ENTRIES:
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def check_vocabulary(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", path: str) -> None:
    """Raise [`UserError`] if the tokenizer has more ids than the model's embedding has rows.

    A pad token beyond the table is no fault: no model reads it ([`sandan.models.tokens`]).
    """
    vocabulary = config.get_text_config().vocab_size
    if any(token >= vocabulary for token in set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}):
        raise UserError(
            f"{path}: vocabulary mismatch: the tokenizer has {len(tokenizer):,} tokens, the model {vocabulary:,} "
            "rows; use the tokenizer that the model was trained with"
        )


def check_reading(tokenizer: "PreTrainedTokenizerBase", path: str, config: "PretrainedConfig") -> None:
    """Raise [`UserError`] if the tokenizer at `path` would read text differently when saved with a model of this kind.

    For a few kinds of model (`qwen2`) transformers uses that kind's own tokenizer class and ignores the files.
    """
    from transformers import AutoTokenizer

    def rules(one: "PreTrainedTokenizerBase") -> Any:
        return one.backend_tokenizer.to_str() if one.is_fast else type(one)

    beside = AutoTokenizer.from_pretrained(path, config=config, **NO_CODE)
    if rules(beside) != rules(tokenizer):
        raise UserError(
            f"{path}: beside a model of model_type {config.model_type!r} transformers reads every tokenizer as "
            f"{type(beside).__name__}, which this one is not; take another model_type (llama has the fields of most)"
        )


def check_same_tokens(tokenizer: "PreTrainedTokenizerBase", path: str, key: str) -> None:
    """Raise [`UserError`] if the tokenizer saved at `path` and `tokenizer` give different ids to tokens.

    A pad token that only one of them has is no fault: no model reads it ([`sandan.models.tokens`]).
    """
    saved = load_tokenizer(path)
    different = saved.get_vocab().items() ^ tokenizer.get_vocab().items()
    if {text for text, _ in different} - ({saved.pad_token} ^ {tokenizer.pad_token}):
        raise UserError(
            f"{path}: {key}: vocabulary mismatch: its tokenizer numbers tokens otherwise than the SFT model's; "
            "run its stage again with this tokenizer"
        )


def model_init_kwargs(model_args: "ModelConfig", extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return `from_pretrained` keywords of a [`~trl.ModelConfig`]; `extra` (`model_init_kwargs`) overrides them.

    Raises:
        UserError: if `extra` asks for code of the model's folder, or for weights from a pickle; and as
            [`only_safetensors`] for the model that `model_args` names.
    """
    for name, only in SAFE.items():
        if (extra or {}).get(name, only) != only:
            raise UserError(
                f"model_init_kwargs: {name}: only {str(only).lower()} is allowed: no code of a model is run"
            )
    for name in set(UNCHECKED) & set(extra or {}):
        raise UserError(f"model_init_kwargs: {name}: is not supported: only checked safetensors are read")
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **SAFE,
        **(extra or {}),
    }
    path = model_args.model_name_or_path
    return only_safetensors(path, kwargs) if path else kwargs


# ---- Only safetensors, no code ----


def only_safetensors(path: str | Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `from_pretrained` keywords by which the model at `path` is read from safetensors, after a check that it can.

    transformers and PEFT unpickle any file without the suffix `.safetensors` that an index, `config.json` or an adapter
    leads them to, also with `use_safetensors`. For a model on the Hub the result names the commit that was checked.

    Args:
        kwargs: further keywords of `from_pretrained`.

    Raises:
        UserError: naming the file that leads to other weights.
    """
    hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    # transformers looks for an adapter beside the subfolder too.
    places = [hub, {name: value for name, value in hub.items() if name != "subfolder"}]
    adapters = [adapter for place in places if (adapter := check_adapter(path, place)) is not None]
    for adapter in adapters:
        check_weights(below_adapter(path, adapter), hub)
    # transformers takes a folder that holds a model and an adapter as both.
    if adapters and not Path(path, "config.json").is_file():
        return {**kwargs, **SAFE}
    commit = check_weights(path, hub)
    return {**kwargs, **SAFE, **({} if commit is None else {"revision": commit})}


def check_weights(path: str | Path, hub: dict[str, Any]) -> str | None:
    """Refuse a model at `path` if transformers would read its weights from other files than safetensors beside it.

    Args:
        hub: where on the Hub the files are, by the names in `HUB_OPTIONS`.

    Returns:
        The commit that was checked, or None if the model is not on the Hub.

    Raises:
        UserError: naming the file that leads to other weights.
    """
    from transformers.utils import extract_commit_hash

    if Path(path).is_file():
        raise UserError(f"{path}: is a file; name the folder of a model")
    commit = None if Path(path).is_dir() else extract_commit_hash(find_file(path, "config.json", hub), None)
    hub = hub if commit is None else hub | {"revision": commit}
    config = read_settings(path, "config.json", hub) or {}
    named = [name for name in _weights_named_in(config, path) if name != WEIGHTS]
    sharded = [_check_index(path, name.removesuffix(".index.json"), hub) for name in (WEIGHTS, *named)]
    # Without a config the loader says more, for example that the Hub cannot be reached.
    if (Path(path).is_dir() or config) and not any(sharded):
        for name in named or [WEIGHTS]:
            if not _has_file(path, name, hub):
                raise UserError(f"{path}: no {name} in it; {ONLY}")
    return commit


def _weights_named_in(config: dict[str, Any], path: str | Path) -> Iterator[str]:
    """Yield the weight files that a model's settings name, at any depth: parts of a model have settings of their own."""
    rest: list[Any] = [config]
    while rest:
        entries = rest.pop()
        rest.extend(value for value in entries.values() if isinstance(value, dict))
        # With it, transformers would read `transformers_weights` from an entry of another name.
        if "attribute_map" in entries:
            raise UserError(f"{path}: config.json: attribute_map: is not supported; remove the entry")
        if name := entries.get("transformers_weights"):
            if not re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", str(name)):
                raise UserError(f"{path}: config.json: transformers_weights: {name!r}: {ONLY}")
            yield name


def _check_index(path: str | Path, weights: str, hub: dict[str, Any]) -> bool:
    """Return whether there is an index of these weights, and refuse one that names other files than safetensors."""
    index = read_settings(path, f"{weights}.index.json", hub)
    if index is None:
        return False
    shards = index.get("weight_map")
    if not shards or not isinstance(shards, dict) or not isinstance(index.get("metadata"), dict):
        raise UserError(f"{path}: {weights}.index.json: no `weight_map` and `metadata` in it; save the model again")
    for shard in shards.values():
        if not re.fullmatch(r"[^/\\]+\.safetensors", str(shard)):
            raise UserError(f"{path}: {weights}.index.json: weight_map: {shard!r}: {ONLY}")
    return True


def check_adapter(path: str | Path, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the adapter at `path`, or None if there is no adapter.

    Args:
        hub: where on the Hub the files are, by the names in `HUB_OPTIONS`.

    Raises:
        UserError: if PEFT would read it from other files than its safetensors.
    """
    settings = read_settings(path, "adapter_config.json", hub)
    if settings is None:
        return None
    for name in ADAPTER_READS:
        if settings.get(name):
            raise UserError(f"{path}: adapter_config.json: {name}: is not supported: it reads further files or code")
    if not _has_file(path, ADAPTER, hub):
        raise UserError(f"{path}: no {ADAPTER} in it; {ONLY}")
    return settings


def below_adapter(path: str | Path, adapter: dict[str, Any]) -> str:
    """Return the name of the model below the adapter at `path`.

    Raises:
        UserError: if the adapter's settings name none.
    """
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: adapter_config.json: base_model_name_or_path: missing; name the model below it")
    return base


def read_settings(path: str | Path, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Return a JSON file of a model's folder or Hub repository, or None if there is no such file.

    Raises:
        UserError: if it holds anything else than one JSON object.
    """
    file = find_file(path, name, hub)
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {name}: no valid JSON file: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: {name}: holds no JSON object; save the model again")
    return settings


def find_file(path: str | Path, name: str, hub: dict[str, Any]) -> str | None:
    """Return the local path of a file of a folder or Hub repository, or None if it has no such file.

    Raises:
        UserError: if there is no such repository.
    """
    from transformers.utils import cached_file

    quiet = {
        f"_raise_exceptions_for_{fault}": False for fault in ("missing_entries", "connection_errors", "gated_repo")
    }
    try:
        return cached_file(path, name, **quiet, **hub)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model can be loaded: {first_line(error)}") from error


def _has_file(path: str | Path, name: str, hub: dict[str, Any]) -> bool:
    """Return whether a folder or Hub repository has a file, without downloading it."""
    from transformers.utils import has_file

    asked = {key: value for key, value in hub.items() if key not in ("subfolder", "force_download")}
    return has_file(path, str(PurePosixPath(hub.get("subfolder", ""), name)), **asked)


def forget_code(model: "PreTrainedModel") -> None:
    """Remove the entries by which a model's settings name code, so that they are not saved with it."""
    for settings in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in CODE_ENTRIES:
            getattr(settings, "__dict__", {}).pop(name, None)


# ---- Loading ----


def load_causal_lm(path: str, device: str | None = None) -> "PreTrainedModel":
    """Load a causal LM for inference, in the dtype it was saved in.

    Args:
        path: an earlier stage's folder or a Hub name.
        device: where to put it; by default the device that `accelerate launch` uses for training.

    Raises:
        UserError: if no such model can be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _placed(lambda: load_model(AutoModelForCausalLM, path), device)


def load_masked_lm(path: str, device: str | None = None) -> "PreTrainedModel":
    """Load a masked LM, otherwise as [`load_causal_lm`]."""
    from transformers import AutoModelForMaskedLM

    return _placed(lambda: load_model(AutoModelForMaskedLM, path), device)


def load_reward_model(path: str, device: str | None = None, key: str = "reward_model") -> "PreTrainedModel":
    """Load a sequence classifier with one output and place it, otherwise as [`load_classifier`]."""
    return _placed(lambda: load_classifier(path, key), device)


def load_classifier(path: str, key: str, **kwargs: Any) -> "PreTrainedModel":
    """Load a sequence classifier with one output.

    Args:
        key: the option that names it.
        kwargs: further keywords of `from_pretrained`.

    Raises:
        UserError: if no such model can be loaded, or weights are missing, as in a language model's folder.
    """
    from transformers import AutoModelForSequenceClassification

    auto_model = AutoModelForSequenceClassification
    model, info = load_model(auto_model, path, num_labels=1, output_loading_info=True, **kwargs)
    # An adapter brings its head with it; `missing_keys` are those of the model below.
    if not Path(path, "adapter_config.json").is_file():
        refuse_new_weights(path, info["missing_keys"], key)
    return model


def refuse_new_weights(path: str, missing: Iterable[str], key: str) -> None:
    """Refuse a reward model of which weights are missing: they would be random, and so would the scores.

    Args:
        missing: names of the weights, as `from_pretrained` reports them.
        key: the option that names the model.

    Raises:
        UserError: naming the first of them.
    """
    names = ", ".join(sorted(missing)[:3])
    if names:
        raise UserError(
            f"{path}: {key}: not a reward model: {names} missing, its scores would be random; "
            "name the folder of the reward stage, or a sequence classifier"
        )


def base_of(model: Any) -> "PreTrainedModel":
    """Return a model without its adapters, or the model itself if it has none."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def quantization(model_args: "ModelConfig") -> dict[str, Any]:
    """Return `from_pretrained` keywords for `load_in_4bit` and `load_in_8bit`; empty if neither is set.

    Raises:
        UserError: if bitsandbytes or a GPU is missing.
    """
    import torch
    from transformers.utils import is_bitsandbytes_available
    from trl import get_quantization_config

    key = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
    if not getattr(model_args, key):
        return {}
    if model_args.load_in_4bit and model_args.load_in_8bit:
        raise UserError("load_in_8bit: excludes load_in_4bit; give one")
    needs = {"bitsandbytes": is_bitsandbytes_available(), "a GPU": torch.cuda.is_available()}
    if missing := [name for name, there in needs.items() if not there]:
        raise UserError(
            f"{key}: needs {' and '.join(missing)}, not found here; without it the adapters are trained on whole weights"
        )
    return {"quantization_config": get_quantization_config(model_args)}


def unquantized(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return the configuration of the weights before they were quantized, which are trained and saved in float32."""
    import torch

    if not hasattr(config, "quantization_config"):
        return config
    whole = copy.deepcopy(config)
    del whole.quantization_config
    whole.dtype = torch.float32
    return whole


def load_model(auto_model: Any, path: str, **kwargs) -> "PreTrainedModel":
    """Load a model with `auto_model.from_pretrained`, from safetensors.

    Raises:
        UserError: if no such model can be loaded, or as [`only_safetensors`].
    """
    from safetensors import SafetensorError

    try:
        loaded = auto_model.from_pretrained(path, **only_safetensors(path, kwargs))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: no model can be loaded: {first_line(error)}") from error
    # With `output_loading_info` the model comes with a report.
    forget_code(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def first_line(error: BaseException) -> str:
    """Return an error's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300].strip() or type(error).__name__


def _placed(load: "Callable[[], PreTrainedModel]", device: str | None) -> "PreTrainedModel":
    """Load a model for inference and place it on the device."""
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    # With this option, which the launch files for FSDP set, only the first process would read the weights; the others
    # would hold zeros until training begins.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        model = load()
    return model.to(device or PartialState().device).eval()
