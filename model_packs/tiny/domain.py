"""Word problems whose every correct step is known exactly.

A problem is a list of facts and a question; its solution repeats each needed fact in order,
computes, and ends with the answer. For given facts the solution is unique, so checking a step is
comparing strings. This module knows no model and no tokenizer.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SEPARATOR: Final = "\n\n"
LARGEST_VALUE: Final = 999
NAMES: Final = (
    *("Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy", "Jim"),
    *("Kim", "Leo", "Mia", "Ned", "Oda", "Pam", "Ray", "Sue", "Tom", "Una"),
)
ITEMS: Final = ("pens", "books", "coins", "cards", "shells", "stamps")


class Split(StrEnum):
    """Says what a problem may be used for; a problem's text alone decides its split."""

    TRAINING = "training"
    CALIBRATION = "calibration"
    HELD_OUT = "held_out"


class Kind(StrEnum):
    """Names what makes a problem hard, for breaking results down."""

    PLAIN = "plain"
    DISTRACTOR = "distractor"
    PRODUCT = "product"


class Relation(StrEnum):
    """Names how one person's count follows from others'."""

    MORE = "more"
    FEWER = "fewer"
    TIMES = "times"
    HALF = "half"
    TOGETHER = "together"


@dataclass(frozen=True, slots=True)
class Fact:
    """Ties the count of `owner` to that of `base` (and of `other`, or to the number `amount`)."""

    owner: str
    relation: Relation
    base: str
    amount: int = 0
    other: str = ""

    def text(self) -> str:
        """Writes the fact as it stands in the problem and, repeated, in its step."""
        match self.relation:
            case Relation.MORE:
                return f"{self.owner} has {self.amount} more than {self.base}"
            case Relation.FEWER:
                return f"{self.owner} has {self.amount} fewer than {self.base}"
            case Relation.TIMES:
                return f"{self.owner} has {self.amount} times as many as {self.base}"
            case Relation.HALF:
                return f"{self.owner} has half as many as {self.base}"
            case Relation.TOGETHER:
                return f"{self.owner} has as many as {self.base} and {self.other} together"

    def equation(self, counts: dict[str, int]) -> tuple[str, int]:
        """Returns the left side of the step's equation and its value."""
        base = counts[self.base]
        match self.relation:
            case Relation.MORE:
                return f"{base} + {self.amount}", base + self.amount
            case Relation.FEWER:
                return f"{base} - {self.amount}", base - self.amount
            case Relation.TIMES:
                return f"{base} * {self.amount}", base * self.amount
            case Relation.HALF:
                return f"{base} / 2", base // 2
            case Relation.TOGETHER:
                other = counts[self.other]
                return f"{base} + {other}", base + other

    def step(self, counts: dict[str, int]) -> str:
        """Writes the one correct step that uses this fact and enters its result into `counts`."""
        left, value = self.equation(counts)
        counts[self.owner] = value
        return f"{self.text()}: {left} = {value}; {self.owner} owns {value}."


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds a problem's text with its whole correct solution."""

    text: str
    steps: tuple[str, ...]
    answer: int
    kind: Kind

    @property
    def problem_id(self) -> str:
        """Names the problem by its text, so that equal texts have equal ids."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def answer_step(answer: int) -> str:
    r"""Writes the closing step.

    >>> answer_step(22)
    'The answer is \\boxed{22}.'
    """
    return f"The answer is \\boxed{{{answer}}}."


def split_of(text: str) -> Split:
    """Assigns a problem text to its split: 90 % training, 5 % calibration, 5 % held out."""
    bucket = hashlib.sha256(text.encode()).digest()[0]  # 0..255
    if bucket < 13:
        return Split.HELD_OUT
    return Split.CALIBRATION if bucket < 26 else Split.TRAINING


@dataclass(frozen=True, slots=True)
class Mixture:
    """Says how problems are drawn: operation counts, rates of hard kinds, number sizes."""

    operation_weights: tuple[tuple[int, float], ...] = ((2, 0.3), (3, 0.4), (4, 0.3))
    distractor_rate: float = 0.25
    product_rate: float = 0.12
    largest_start: int = 60
    largest_amount: int = 40
    largest_factor: int = 5
    one_digit_rate: float = 0.5  # additions and subtractions of 2 to 9, which are learned first


def _relations_open_to(value: int) -> list[tuple[Relation, float]]:
    choices = [(Relation.MORE, 3.0)] if value <= LARGEST_VALUE - 2 else []
    if value > 3:
        choices.append((Relation.FEWER, 3.0))
    if 2 <= value <= 60:
        choices.append((Relation.TIMES, 2.0))
    if value % 2 == 0:
        choices.append((Relation.HALF, 1.0))
    return choices


def _draw_fact(
    rng: random.Random, mixture: Mixture, owner: str, base: str, counts: dict[str, int]
) -> Fact:
    value = counts[base]
    largest = 9 if rng.random() < mixture.one_digit_rate else mixture.largest_amount
    others = [name for name in counts if name != base and value + counts[name] <= LARGEST_VALUE]
    if others and rng.random() < 0.1:
        return Fact(owner, Relation.TOGETHER, base, other=rng.choice(others))
    choices = _relations_open_to(value)
    relation = rng.choices([c[0] for c in choices], [c[1] for c in choices])[0]
    match relation:
        case Relation.MORE:
            return Fact(owner, relation, base, rng.randint(2, min(largest, LARGEST_VALUE - value)))
        case Relation.FEWER:
            return Fact(owner, relation, base, rng.randint(2, min(largest, value - 1)))
        case Relation.TIMES:
            return Fact(owner, relation, base, rng.randint(2, mixture.largest_factor))
        case _:
            return Fact(owner, relation, base)


def draw_problem(rng: random.Random, mixture: Mixture = Mixture()) -> Problem:
    """Draws one problem from any split."""
    names = rng.sample(NAMES, 8)
    operation_count = rng.choices(*zip(*mixture.operation_weights, strict=True))[0]
    product_at = rng.randrange(operation_count) if rng.random() < mixture.product_rate else -1
    start = rng.randint(2 if product_at != 0 else 11, mixture.largest_start)
    counts = {names[0]: start}
    facts: list[Fact] = []
    while len(facts) < operation_count:
        owner, base = names[len(facts) + 1], names[len(facts)]
        value = counts[base]
        if len(facts) == product_at and 11 <= value <= LARGEST_VALUE // 11:
            fact = Fact(
                owner, Relation.TIMES, base, rng.randint(11, min(99, LARGEST_VALUE // value))
            )
        else:
            fact = _draw_fact(rng, mixture, owner, base, counts)
        fact.step(counts)
        facts.append(fact)
    told = [fact.text() for fact in facts]
    has_distractor = rng.random() < mixture.distractor_rate
    if has_distractor:
        spare = f"{names[-1]} owns {rng.randint(2, mixture.largest_start)}"
        told.insert(rng.randint(0, len(told)), spare)
    text = (
        f"{names[0]} owns {start}. "
        + "".join(f"{fact}. " for fact in told)
        + f"How many {rng.choice(ITEMS)} does {facts[-1].owner} have?"
    )
    return _problem(text, {names[0]: start}, facts, has_distractor)


def _problem(text: str, counts: dict[str, int], facts: Sequence[Fact], distractor: bool) -> Problem:
    steps = [fact.step(counts) for fact in facts]
    answer = counts[facts[-1].owner]
    product = any(fact.relation is Relation.TIMES and fact.amount > 9 for fact in facts)
    kind = Kind.PRODUCT if product else Kind.DISTRACTOR if distractor else Kind.PLAIN
    return Problem(text, (*steps, answer_step(answer)), answer, kind)


def problems(seed: int, split: Split, mixture: Mixture = Mixture()) -> Iterator[Problem]:
    """Yields problems of one split without end; the same seed gives the same problems."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, mixture)
        if split_of(problem.text) is split:
            yield problem


def drill(rng: random.Random, mixture: Mixture, equation_count: int) -> list[tuple[str, str]]:
    """Draws bare equations as (question, result) pairs, distributed as in the problems' steps."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < equation_count:
        for step in draw_problem(rng, mixture).steps[:-1]:
            left, right = step.split(": ")[1].split(" = ")
            drawn.append((f"{left} = ", right.split("; ")[0] + "; "))
    return drawn[:equation_count]


_NAME: Final = r"[A-Z][a-z]+"
_OWNED: Final = re.compile(rf"({_NAME}) owns (\d+)")
_PROBLEM: Final = re.compile(rf"({_NAME}) owns (\d+)\. (.*)How many [a-z]+ does ({_NAME}) have\?")
_FACTS: Final = (
    (Relation.MORE, re.compile(rf"({_NAME}) has (?P<amount>\d+) more than ({_NAME})")),
    (Relation.FEWER, re.compile(rf"({_NAME}) has (?P<amount>\d+) fewer than ({_NAME})")),
    (Relation.TIMES, re.compile(rf"({_NAME}) has (?P<amount>\d+) times as many as ({_NAME})")),
    (Relation.HALF, re.compile(rf"({_NAME}) has half as many as ({_NAME})")),
    (
        Relation.TOGETHER,
        re.compile(rf"({_NAME}) has as many as ({_NAME}) and (?P<other>{_NAME}) together"),
    ),
)


def _parse_fact(sentence: str) -> Fact:
    for relation, pattern in _FACTS:
        if found := pattern.fullmatch(sentence):
            named = found.groupdict()
            people = [g for g in found.groups() if g and g not in named.values()]
            return Fact(
                people[0], relation, people[1], int(named.get("amount", 0)), named.get("other", "")
            )
    raise ValueError(f"problem: no fact can be read from {sentence!r}")


def solve(text: str) -> Problem:
    """Solves a problem from its text alone.

    Raises ValueError where the text is no problem of this domain.

    >>> solve("Ann owns 14. Bob has 8 more than Ann. How many pens does Bob have?").steps[0]
    'Bob has 8 more than Ann: 14 + 8 = 22; Bob owns 22.'
    """
    found = _PROBLEM.fullmatch(text)
    if found is None:
        raise ValueError(
            "problem: expected 'NAME owns NUMBER. FACTS How many ITEM does NAME have?', "
            f"got {text!r}"
        )
    first, start, told, asked = found.groups()
    owned = {first: int(start)}
    facts: list[Fact] = []
    for sentence in told.split(". "):
        if held := _OWNED.fullmatch(sentence):
            owned[held[1]] = int(held[2])
        elif sentence:
            facts.append(_parse_fact(sentence))
    needed = {asked}
    for fact in reversed(facts):
        if fact.owner in needed:
            needed |= {fact.base, fact.other}
    used = [fact for fact in facts if fact.owner in needed]
    has_distractor = len(used) < len(facts) or not needed.issuperset(owned)
    return _problem(text, owned, used, has_distractor)


def next_step(text: str, steps: Sequence[str]) -> str | None:
    """Returns the correct step after `steps`; None after a mistake or the last step."""
    solution = solve(text).steps
    if tuple(steps) != solution[: len(steps)] or len(steps) == len(solution):
        return None
    return solution[len(steps)]


def first_wrong_step(problem: Problem, steps: Sequence[str]) -> int | None:
    """Returns the index of the first step that is not the correct one; None where there is none."""
    for index, step in enumerate(steps):
        if index >= len(problem.steps) or step != problem.steps[index]:
            return index
    return None
