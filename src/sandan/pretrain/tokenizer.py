"""Train a tokenizer: byte-level BPE with a chat template, saved so that `AutoTokenizer` loads it."""

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError


PAD, BOS, EOS, MASK = "<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>"
ROLES = ("system", "user", "assistant")

# `{% generation %}` marks the assistant's text, so that `assistant_only_loss` trains the answer and its stop token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Japanese has no spaces. A cut where the script changes separates words (牛|は|草|を|食|べます), as spaces do in
# English; without it BPE would learn whole clauses as single tokens.
SCRIPT_RUNS = Regex(r"\p{Han}+|\p{Hiragana}+|[\p{Katakana}ー]+")

# The time to learn the merges of a piece grows with the square of its length, and text without spaces (Chinese, one
# line of base64) is one piece. For learning, runs of LONGEST_PIECE characters are cut out; ordinary words are shorter.
LONGEST_PIECE = 128
LONG_RUNS = Regex("|".join(f"{kind}{{{LONGEST_PIECE}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (lossless on any Unicode text) with distinct pad, bos, eos and mask tokens.

    Args:
        texts: the corpus; read once.
        vocab_size: size of the vocabulary, with the special tokens and the 256 bytes.

    Raises:
        UserError: if `vocab_size` has no room for the bytes and the special tokens.
    """
    special_tokens = [PAD, BOS, EOS, MASK, *(f"<|{role}|>" for role in ROLES)]
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"vocab_size: {vocab_size} is too small; bytes and special tokens alone need {smallest}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = _pieces([SCRIPT_RUNS, LONG_RUNS])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.pre_tokenizer = _pieces([SCRIPT_RUNS])  # To apply the merges, long pieces take no longer than short ones.
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _pieces(runs: Iterable[Regex]) -> pre_tokenizers.Sequence:
    """Return the cutting of text into pieces, which no token crosses: the runs, then words as GPT-2 cuts them."""
    cuts = [pre_tokenizers.Split(run, "isolated") for run in runs]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def texts_of(rows: Iterable[dict]) -> Iterator[str]:
    """Yield the texts of rows in any of the data forms: `text`, `prompt` + `completion` or `messages`."""
    for row in rows:
        if "text" in row:
            yield row["text"]
            continue
        parts = [row["messages"]] if "messages" in row else [row["prompt"], row["completion"]]
        for part in parts:
            yield from (part,) if isinstance(part, str) else (message["content"] for message in part)
