"""The kinds of constraints that are added to prompts: those of IFEval whose checkers need no download.

Each kind is named by its IFEval id (Zhou et al. 2023, arXiv 2311.07911), so that the checkers and the files of IFEval are
used as they are. The wording is our own, several for each kind: a policy should learn the constraint, not a sentence.
Number of sentences, words in capitals (both need a download of NLTK's), other languages and answers from a list are not
among them; they show whether a policy follows kinds that it was not trained on.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


AT_LEAST, LESS_THAN = "at least", "less than"
COMMON_WORDS = (
    "simple", "important", "careful", "example", "reason", "people", "future", "better", "useful", "problem", "change",
    "nature", "family", "history", "energy", "choice", "result", "system", "moment", "balance",
)  # fmt: skip
END_PHRASES = (
    "Is there anything else I can help with?",
    "That is all you need to know.",
    "I hope this answers your question.",
    "Let me know what you think.",
    "Thank you for reading.",
)
POSTSCRIPTS = ("P.S.", "P.P.S")
SECTIONS = ("Section", "PARAGRAPH", "Day", "Part")
# Letters that a short answer can use often without nonsense.
FREQUENT_LETTERS = "aeionrstlcd"

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of constraint.

    Args:
        instruction_id: its IFEval id.
        draw: `(random numbers, instruction) -> kwargs` of the checker; None if the instruction does not suit it.
        wordings: sentences that say it, with the names of the kwargs in braces.
        excludes: IFEval ids, or their first parts, that contradict it.
    """

    instruction_id: str
    draw: Callable[[random.Random, str], Kwargs | None]
    wordings: tuple[str, ...]
    excludes: tuple[str, ...] = ()

    def text(self, kwargs: Kwargs, rng: random.Random) -> str:
        """Return a sentence that says the constraint."""
        shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        return rng.choice(self.wordings).format(**shown)


def content_words(instruction: str) -> list[str]:
    """Return the different words of at least five letters, in lower case and in their order."""
    return list(dict.fromkeys(word.lower() for word in re.findall(r"[A-Za-z]{5,}", instruction)))


def _nothing(rng: random.Random, instruction: str) -> Kwargs:
    return {}


def _number(name: str, low: int, high: int) -> Callable[[random.Random, str], Kwargs]:
    return lambda rng, instruction: {name: rng.randint(low, high)}


def _choice(name: str, values: tuple[str, ...]) -> Callable[[random.Random, str], Kwargs]:
    return lambda rng, instruction: {name: rng.choice(values)}


def _words(rng: random.Random, instruction: str) -> Kwargs:
    relation = rng.choice((AT_LEAST, LESS_THAN))
    counts = range(30, 130, 10) if relation == AT_LEAST else range(40, 160, 10)
    return {"num_words": rng.choice(counts), "relation": relation}


def _forbidden(rng: random.Random, instruction: str) -> Kwargs:
    own, count = content_words(instruction), rng.randint(1, 3)
    return {"forbidden_words": sorted(rng.sample(own if len(own) >= count else list(COMMON_WORDS), count))}


def _keywords(rng: random.Random, instruction: str) -> Kwargs:
    return {"keywords": sorted(rng.sample(COMMON_WORDS, rng.randint(1, 3)))}


def _keyword(rng: random.Random, instruction: str) -> Kwargs:
    keyword = rng.choice(content_words(instruction) or COMMON_WORDS)
    return {"keyword": keyword, "frequency": rng.randint(2, 4), "relation": AT_LEAST}


def _letter(rng: random.Random, instruction: str) -> Kwargs:
    return {
        "letter": rng.choice(FREQUENT_LETTERS),
        "let_frequency": rng.randint(5, 20),
        "let_relation": AT_LEAST,
    }


def _sections(rng: random.Random, instruction: str) -> Kwargs:
    return {"section_spliter": rng.choice(SECTIONS), "num_sections": rng.randint(2, 4)}


def _repeated(rng: random.Random, instruction: str) -> Kwargs | None:
    return {"prompt_to_repeat": instruction} if len(instruction.split()) <= 30 else None


FORMS = ("detectable_format", "length_constraints", "combination", "startend")
KINDS = (
    Kind("punctuation:no_comma", _nothing, (
        "Do not use any commas.", "Your answer must not contain a comma.", "Write without commas.",
    )),
    Kind("length_constraints:number_words", _words, (
        "Use {relation} {num_words} words.", "Your answer should have {relation} {num_words} words.",
        "Answer in {relation} {num_words} words.",
    )),
    Kind("length_constraints:number_paragraphs", _number("num_paragraphs", 2, 4), (
        "Write exactly {num_paragraphs} paragraphs. Separate the paragraphs with ***",
        "Your answer should consist of {num_paragraphs} paragraphs, with the markdown divider *** between them.",
    )),
    Kind("keywords:existence", _keywords, (
        "Use the following words: {keywords}.", "Include the keywords {keywords} in your answer.",
    ), ("detectable_format:json_format",)),
    Kind("keywords:frequency", _keyword, (
        'Use the word "{keyword}" {relation} {frequency} times.',
        "The word {keyword} should appear in your answer {relation} {frequency} times.",
    ), ("keywords:forbidden_words",)),
    Kind("keywords:forbidden_words", _forbidden, (
        "Do not use the following words: {forbidden_words}.", "Avoid the words {forbidden_words} in your answer.",
    ), ("keywords:frequency", "keywords:existence", "combination:repeat_prompt")),
    Kind("keywords:letter_frequency", _letter, (
        "Use the letter {letter} {let_relation} {let_frequency} times.",
        'The letter "{letter}" should appear {let_relation} {let_frequency} times.',
    )),
    Kind("detectable_format:number_highlighted_sections", _number("num_highlights", 1, 4), (
        "Highlight at least {num_highlights} parts of your answer with markdown, like *this part*.",
        "Put at least {num_highlights} phrases in markdown emphasis, such as *important phrase*.",
    )),
    Kind("detectable_format:number_bullet_lists", _number("num_bullets", 2, 5), (
        "Give exactly {num_bullets} bullet points, in markdown. For example:\n* This is a point.",
        "Your answer must contain exactly {num_bullets} markdown bullet points, each on a line that starts with *",
    ), ("detectable_format:number_highlighted_sections", "length_constraints:number_paragraphs")),
    Kind("detectable_format:title", _nothing, (
        "Give your answer a title in double angular brackets, such as <<a short title>>.",
        "Begin with a title wrapped in double angular brackets, i.e. <<title>>.",
    ), ("startend:quotation",)),
    Kind("detectable_format:multiple_sections", _sections, (
        "Write {num_sections} sections. Begin each with {section_spliter} X, for example {section_spliter} 1.",
        "Your answer must have {num_sections} sections, marked {section_spliter} 1, {section_spliter} 2 and so on.",
    ), ("change_case", "length_constraints:number_paragraphs", "detectable_format:number_bullet_lists")),
    Kind("detectable_format:json_format", _nothing, (
        "Wrap your whole answer in JSON.", "Answer in JSON format only; markdown ticks such as ```json are allowed.",
    ), (*FORMS, "change_case", "punctuation", "keywords:existence", "detectable_content")),
    Kind("detectable_content:number_placeholders", _number("num_placeholders", 1, 4), (
        "Use at least {num_placeholders} placeholders in square brackets, such as [name].",
        "Your answer must contain at least {num_placeholders} placeholders, written like [address].",
    )),
    Kind("detectable_content:postscript", _choice("postscript_marker", POSTSCRIPTS), (
        "At the end, add a postscript that starts with {postscript_marker}",
        "Finish with a postscript, beginning with {postscript_marker}",
    ), ("startend:end_checker",)),
    Kind("startend:end_checker", _choice("end_phrase", END_PHRASES), (
        'End your answer with the exact phrase "{end_phrase}" and nothing after it.',
        "The very last sentence must be: {end_phrase}",
    ), ("detectable_content:postscript",)),
    Kind("startend:quotation", _nothing, (
        "Wrap your whole answer in double quotation marks.", 'Put double quotation marks (") around the entire answer.',
    ), ("detectable_format:title", "combination")),
    Kind("change_case:english_capital", _nothing, (
        "Write in English and in capital letters only.", "Your whole answer must be in English, in all capital letters.",
    ), ("change_case", "detectable_format:multiple_sections")),
    Kind("change_case:english_lowercase", _nothing, (
        "Write in English and in lowercase letters only.",
        "Your whole answer must be in English, in all lowercase letters. Do not use capital letters.",
    ), ("change_case", "detectable_format:multiple_sections")),
    Kind("combination:two_responses", _nothing, (
        "Give two different answers, separated by six asterisks: ******",
        "Write two different responses. Put ****** between them and nowhere else.",
    ), (*FORMS, "detectable_content")),
    Kind("combination:repeat_prompt", _repeated, (
        "First repeat the request above word for word, then answer it. Say nothing before you repeat the request.",
        "Before you answer, repeat the request without changes; this sentence is not part of the request.",
    ), (*FORMS, "change_case", "punctuation", "keywords:forbidden_words")),
)  # fmt: skip


def contradict(one: Kind, other: Kind) -> bool:
    """Return whether two kinds cannot be asked for together."""
    return one.instruction_id == other.instruction_id or any(
        part in kind.excludes
        for kind, named in ((one, other), (other, one))
        for part in (named.instruction_id, named.instruction_id.partition(":")[0])
    )
