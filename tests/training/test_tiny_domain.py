"""The tiny pack's problems, checker and tokenizer, without any training."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_packs.tiny.domain import (
    NAMES,
    SEPARATOR,
    Split,
    first_wrong_step,
    next_step,
    problems,
    solve,
    split_of,
)
from model_packs.tiny.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SAMPLE = list(itertools.islice(problems(5, Split.TRAINING), 200))


def test_the_checker_accepts_its_own_solutions() -> None:
    for problem in SAMPLE:
        assert solve(problem.text) == problem
        for count, step in enumerate(problem.steps):
            assert next_step(problem.text, problem.steps[:count]) == step
        assert first_wrong_step(problem, problem.steps) is None


def test_the_checker_rejects_every_single_digit_corruption() -> None:
    for problem in SAMPLE[:40]:
        for index, step in enumerate(problem.steps):
            for found in re.finditer(r"\d", step):
                for digit in set("0123456789") - {found.group()}:
                    wrong = step[: found.start()] + digit + step[found.end() :]
                    steps = (*problem.steps[:index], wrong, *problem.steps[index + 1 :])
                    assert first_wrong_step(problem, steps) == index
                    assert next_step(problem.text, steps[: index + 1]) is None


def test_a_problem_belongs_to_one_split_by_its_text() -> None:
    texts = {split: {p.text for p in itertools.islice(problems(3, split), 300)} for split in Split}
    for one, other in itertools.combinations(Split, 2):
        assert not texts[one] & texts[other]
    assert all(split_of(text) is split for split, held in texts.items() for text in held)


def test_the_same_seed_gives_the_same_problems() -> None:
    again = itertools.islice(problems(5, Split.TRAINING), 200)
    assert list(again) == SAMPLE


def test_a_text_outside_the_domain_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="problem: expected"):
        solve("What is love?")


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_round_trips_through_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_names_and_the_separator_are_one_token_each() -> None:
    assert len(TOKENIZER.encode("1234567890")) == 10
    assert all(len(TOKENIZER.encode(piece)) == 1 for piece in (*NAMES, SEPARATOR))
    assert TOKENIZER.encode("Bob")[0] in TOKENIZER.encode("22; Bob owns 22.")


def test_steps_have_the_same_ids_alone_and_in_a_solution() -> None:
    for problem in SAMPLE:
        whole = TOKENIZER.encode(
            f"{problem.text}\n" + "".join(step + SEPARATOR for step in problem.steps)
        )
        pieces = TOKENIZER.encode(f"{problem.text}\n")
        for step in problem.steps:
            pieces += TOKENIZER.encode(step) + TOKENIZER.encode(SEPARATOR)
        assert pieces == whole
