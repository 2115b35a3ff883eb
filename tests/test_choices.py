"""Words from a fixed few: one check, one sentence, for every argument that is such a word."""

from typing import Literal, get_args

import pytest

from flatmin.arguments import check_choice

Colour = Literal["red", "green"]


class _CommandError(ValueError):
    pass


@pytest.mark.parametrize("choices", [get_args(Colour), {"red": 1, "green": 2}, iter(["red", "green"])])
def test_any_other_word_is_refused_by_name_with_the_few(choices):
    with pytest.raises(ValueError, match=r"^paint must be one of red, green, got 'blue'$"):
        check_choice("paint", "blue", choices)


@pytest.mark.parametrize("word", get_args(Colour))
def test_every_one_of_the_words_is_let_through(word):
    check_choice("paint", word, get_args(Colour))


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (3, "3"), ("3", "'3'"), (["red"], r"\['red'\]")])
def test_what_is_no_word_is_refused_too_and_shown_as_python_writes_it(value, shown):
    with pytest.raises(ValueError, match=f"got {shown}$"):
        check_choice("paint", value, get_args(Colour))


def test_a_command_ends_with_its_own_error():
    with pytest.raises(_CommandError, match="paint must be one of"):
        check_choice("paint", "blue", ["red"], _CommandError)
