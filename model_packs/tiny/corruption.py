"""Puts one plausible mistake into a correct solution, for free labels.

A mistake is carried through to the end of its step, as a model that makes it would carry it.
"""

import random
import re
from typing import Final

from model_packs.tiny.domain import Problem, answer_step

_STEP: Final = re.compile(
    r"(?P<fact>.+): (?P<left>.+) = (?P<result>\d+); (?P<owner>\w+) owns \d+\."
)
_NUMBER: Final = re.compile(r"\d+")


def slip(rng: random.Random, number: int) -> int:
    """Returns a wrong number that a slip would give: one off, a lost carry, one digit replaced."""
    while True:
        kind = rng.random()
        if kind < 0.5:
            wrong = number + rng.choice((-100, -20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20, 100))
        else:
            digits = list(str(number))
            digits[rng.randrange(len(digits))] = rng.choice("0123456789")
            wrong = int("".join(digits))
        if wrong > 0 and wrong != number:
            return wrong


def _evaluate(left: str) -> int:
    first, sign, second = left.split(" ")
    a, b = int(first), int(second)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]


def _wrong_step(rng: random.Random, step: str, people: list[str], numbers: list[int]) -> str:
    found = _STEP.fullmatch(step)
    if found is None:  # the closing step
        answer = int(_NUMBER.findall(step)[-1])
        return answer_step(rng.choice([n for n in numbers if n != answer] + [slip(rng, answer)]))
    fact, left, result, owner = found["fact"], found["left"], int(found["result"]), found["owner"]
    kind = rng.random()
    if kind < 0.6:
        result = slip(rng, result)
    elif kind < 0.8:  # a wrong operand, then right arithmetic
        operands = _NUMBER.findall(left)
        old = rng.choice(operands)
        new = slip(rng, int(old)) if rng.random() < 0.5 else rng.choice(numbers)
        left = re.sub(rf"\b{old}\b", str(new), left, count=1)
        result = max(_evaluate(left), 0)
    elif kind < 0.9:  # a wrong name, copied on
        old_name = rng.choice(re.findall(r"[A-Z][a-z]+", fact))
        new_name = rng.choice(people)
        fact = re.sub(rf"\b{old_name}\b", new_name, fact)
        owner = new_name if owner == old_name else owner
    else:
        return f"{fact}: {left} = {result}; {owner} owns {slip(rng, result)}."
    return f"{fact}: {left} = {result}; {owner} owns {result}."


def corrupt(rng: random.Random, problem: Problem) -> tuple[str, ...]:
    """Returns the solution up to and including one wrong step."""
    at = rng.randrange(len(problem.steps))
    people = [name for name in re.findall(r"[A-Z][a-z]+", problem.text) if name != "How"]
    numbers = [
        int(number) for number in _NUMBER.findall(problem.text + " ".join(problem.steps[:at]))
    ]
    if at < len(problem.steps) - 1 and rng.random() < 0.05:  # an answer too early
        return (*problem.steps[:at], answer_step(rng.choice(numbers)))
    while (wrong := _wrong_step(rng, problem.steps[at], people, numbers)) == problem.steps[at]:
        pass
    return (*problem.steps[:at], wrong)
