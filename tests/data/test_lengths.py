"""Answers are trained whole or not at all; text may be cut."""

import pytest
from datasets import Dataset

from sandan.core.errors import UserError
from sandan.data.lengths import row_tokens, without_cut_answers


def turns(answer):
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]


FORMS = {
    "text": lambda answer: {"prompt": "Q", "completion": answer},
    "turns": lambda answer: {"prompt": turns("")[:1], "completion": turns(answer)[1:]},
    "messages": lambda answer: {"messages": turns(answer)},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_fit_with_their_stop_token_are_left_out_and_counted(form, tokenizer, caplog):
    rows = Dataset.from_list([FORMS[form]("a" * length) for length in (1, 20, 3)])
    longest = row_tokens(rows[1], tokenizer)
    assert len(without_cut_answers(rows, tokenizer, longest)) == 3 and not caplog.records
    assert without_cut_answers(rows, tokenizer, longest - 1).to_list() == [rows[0], rows[2]]
    assert caplog.records[0].message.startswith(f"1 of 3 training rows are longer than {longest - 1} tokens")
    with pytest.raises(UserError, match="max_length: all 3 training rows are longer than 1 tokens"):
        without_cut_answers(rows, tokenizer, 1)
    stream = without_cut_answers(rows.to_iterable_dataset(), tokenizer, longest - 1)
    assert len(list(stream)) == 2


def test_rows_of_text_are_kept(tokenizer):
    rows = Dataset.from_list([{"text": "a" * 100}])
    assert without_cut_answers(rows, tokenizer, 2) is rows is without_cut_answers(rows, tokenizer, None)
