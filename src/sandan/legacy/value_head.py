"""Language models with a value head beside the language-model head, as TRL 0.11 had and saved them."""

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi
from peft import (
    PeftConfig,
    PeftModel,
    PromptLearningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ..core.errors import UserError
from ..models.loading import (
    HUB_OPTIONS,
    WEIGHTS,
    below_adapter,
    check_adapter,
    find_file,
    forget_code,
    only_safetensors,
)


INDEX = "model.safetensors.index.json"
HEAD_OPTIONS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class ValueHead(nn.Module):
    """A linear layer that gives one value for each position, in its own precision (float32)."""

    def __init__(self, config: Any, summary_dropout_prob: float = 0.1):
        super().__init__()
        text = config.get_text_config(decoder=True)
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # Where the model projects its last hidden states (OPT-350m), the head reads the projection.
        self.summary = nn.Linear(getattr(text, "word_embed_proj_dim", text.hidden_size), 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the values, `(..., 1)`."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight))


class ModelWithValueHead(nn.Module):
    """A language model `pretrained_model` and its value head `v_head`; other attributes are the language model's.

    Args:
        pretrained_model: a model of the class's kind, or a `PeftModel` of one.
        summary_dropout_prob: of the head's input.
        v_head_init_strategy: "normal" draws the head's weights with the deviation `v_head_initializer_range`; None
            leaves `nn.Linear`'s.
    """

    transformers_parent_class: ClassVar[Any]
    is_encoder_decoder: ClassVar[bool]

    def __init__(
        self,
        pretrained_model: PreTrainedModel | PeftModel,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        super().__init__()
        if pretrained_model.get_output_embeddings() is None:
            raise ValueError(f"{type(pretrained_model).__name__} has no language-model head; give a model with one")
        if v_head_init_strategy not in (None, "normal"):
            raise ValueError(f"v_head_init_strategy: expected 'normal' or None, found {v_head_init_strategy!r}")
        self.pretrained_model = pretrained_model
        self.is_peft_model = isinstance(pretrained_model, PeftModel)
        self.v_head = ValueHead(pretrained_model.config, summary_dropout_prob).to(pretrained_model.device)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model":
                raise
            return getattr(self.pretrained_model, name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel | PeftModel,
        *args: Any,
        peft_config: PeftConfig | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "ModelWithValueHead":
        """Return a model with a value head: the stored one, if there is one, else a new one.

        Args:
            pretrained_model_name_or_path: a folder or Hub name (of a model or an adapter), or a model.
            peft_config: train a new adapter of this kind.
            is_trainable: whether a stored adapter is to be trained further.
            kwargs: those of the class, and of `from_pretrained` of transformers. Weights are loaded in float32 unless
                `dtype` is given, and from safetensors only.

        Raises:
            ValueError: if the weights are pickled, or an argument is not supported.
        """
        for name in ("reward_adapter", "load_in_8bit", "load_in_4bit"):
            if kwargs.pop(name, None):
                instead = (
                    "score with a model of its own" if name == "reward_adapter" else "give quantization_config instead"
                )
                raise ValueError(f"{name}: not in sandan.legacy; {instead}")
        options = {name: kwargs.pop(name) for name in HEAD_OPTIONS if name in kwargs}
        given, stored = pretrained_model_name_or_path, {}
        if isinstance(given, (str, Path)):
            hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            try:
                model = load_language_model(cls.transformers_parent_class, str(given), is_trainable, args, kwargs, hub)
                stored = stored_head(str(given), hub)
            except UserError as error:  # users of TRL's classes expect this kind
                raise ValueError(str(error)) from error
        else:
            model = given
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError(
                    "peft_config: the model has an adapter already; leave it out (is_trainable=True trains on)"
                )
            quantized = getattr(model, "is_quantized", False)
            model = get_peft_model(prepare_model_for_kbit_training(model) if quantized else model, peft_config)
        if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptLearningConfig):
            raise TypeError(f"{type(model.active_peft_config).__name__}: prompt learning cannot be trained with PPO")
        with_head = cls(model, **options)
        if stored:
            with_head.v_head.load_state_dict(stored)
        return with_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple:
        """Return logits (float32), the loss (None without `labels`), values, and if asked for the cache."""
        kwargs |= {"output_hidden_states": True, "past_key_values": past_key_values}
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = output.decoder_hidden_states if self.is_encoder_decoder else output.hidden_states
        result = output.logits.float(), output.loss, self.v_head(states[-1]).squeeze(-1)
        return (*result, output.past_key_values) if return_past_key_values else result

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the language model's `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write a folder that this class and the plain `from_pretrained` of transformers load.

        The head's tensors `v_head.summary.weight` and `.bias` are beside those of the model, or in a `model.safetensors`
        of their own beside an adapter.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False: would write a pickle; only safetensors are written")
        head = {f"v_head.{name}": tensor for name, tensor in self.v_head.state_dict().items()}
        if not self.is_peft_model:
            weights = kwargs.pop("state_dict", None) or self.pretrained_model.state_dict()
            kwargs["state_dict"] = weights | head
        elif is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            save_file(head, Path(save_directory, WEIGHTS), metadata={"format": "pt"})
        self.pretrained_model.save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push what `save_pretrained` writes; keywords as in [`push_folder`]."""
        return push_folder(repo_id, self.save_pretrained, **kwargs)


class AutoModelForCausalLMWithValueHead(ModelWithValueHead):
    """A causal language model with a value head. See [`ModelWithValueHead`]."""

    transformers_parent_class = AutoModelForCausalLM
    is_encoder_decoder = False


class AutoModelForSeq2SeqLMWithValueHead(ModelWithValueHead):
    """An encoder-decoder with a value head on its decoder. See [`ModelWithValueHead`]."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    is_encoder_decoder = True


# ---- Loading and pushing ----


def load_language_model(
    auto_class: Any, path: str, is_trainable: bool, args: tuple, kwargs: dict[str, Any], hub: dict[str, Any]
) -> PreTrainedModel | PeftModel:
    """Load a model, or the adapter at `path` with the model that it belongs to, from safetensors.

    Raises:
        UserError: if any of their weights would be read from another file.
    """
    if not {"dtype", "torch_dtype"} & set(kwargs):
        kwargs["dtype"] = torch.float32
    adapter = check_adapter(path, hub)
    base = None if adapter is None else below_adapter(path, adapter)
    if base is not None:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    kwargs = only_safetensors(base or path, kwargs)
    model = auto_class.from_pretrained(base or path, *args, **kwargs)
    forget_code(model)
    return model if base is None else PeftModel.from_pretrained(model, path, is_trainable=is_trainable, **hub)


def stored_head(path: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the value head's tensors at `path` by their names in the head, or nothing if no head is stored.

    Raises:
        ValueError: if the weights that may hold it are pickled.
    """
    files = {find_file(path, WEIGHTS, hub)} - {None}
    if index := find_file(path, INDEX, hub):
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files |= {find_file(path, shard, hub) for name, shard in shards.items() if name.startswith("v_head.")}
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            names = [name for name in set(weights.keys()) if name.startswith("v_head.")]
            tensors |= {name.removeprefix("v_head."): weights.get_tensor(name) for name in names}
    if not files and (pickled := find_file(path, "pytorch_model.bin", hub)):
        raise ValueError(
            f"{pickled}: a pickle, which can run code, is not read; if you trust it, convert it: "
            f"safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True), '{WEIGHTS}')"
        )
    return tensors


def push_folder(
    repo_id: str,
    write: Any,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload model with value head",
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Create the Hub repository if it is missing, and push the folder that `write(folder)` writes."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


# ---- The reference ----


def create_reference_model(
    model: ModelWithValueHead | PreTrainedModel, num_shared_layers: int | None = None, pattern: str | None = None
) -> Any:
    """Return a frozen copy of a model in eval mode.

    Args:
        num_shared_layers: let both models share (not copy) the parameters before this layer, which freezes them in the
            model too.
        pattern: the name of a layer, such as "transformer.h.{layer}", where it cannot be found.

    Raises:
        ValueError: if there is no such layer.
    """
    shared = {}
    if num_shared_layers is not None:
        wanted = rf"\b(h|layers?|blocks?)\.{num_shared_layers}\."
        wanted = wanted if pattern is None else re.escape(pattern.format(layer=num_shared_layers) + ".")
        names = [name for name, _ in model.named_parameters()]
        first = next((at for at, name in enumerate(names) if re.search(wanted, name)), None)
        if first is None:
            raise ValueError(
                f"num_shared_layers: {type(model).__name__} has no layer {num_shared_layers}; give fewer, or a pattern"
            )
        shared = {id(parameter): parameter for parameter in list(model.parameters())[:first]}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()
