"""The task of "tiny": sums, worked out column by column before the answer is written.

    prompt      47+58=
    completion  7+8=15;4+5+1=10;105          units first, "+1" where a one is carried, the answer last
    or          7+8=14;4+5+1=10;104?7+8=15;4+5+1=10;105          "?" doubts the attempt before it and begins another; the last one counts

Knows the text of problems, attempts and answers, and how often the pupil that "tiny" imitates slips. Does not know models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PUPIL", "Problem", "Pupil", "answer_of", "is_right", "reward", "sample_problems"]

_PROMPT = re.compile(r"(\d+)\+(\d+)=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One addition of two numbers that are not negative."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b

    @property
    def num_digits(self) -> int:
        """Digits of the longer number, which is the number of columns."""
        return len(str(max(self.a, self.b)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pupil:
    """How a pupil works: knows the way, but is careless, and doubts now and then.

    Attributes:
        slip_alone: probability that the sum of a column is off by one, in a problem of one column.
        slip: the same, per column, in longer problems.
        doubt_right, doubt_wrong: probability to begin another attempt after a right and after a wrong one.
        max_attempts: after this many the pupil stops anyway.
    """

    slip_alone: float
    slip: float
    doubt_right: float
    doubt_wrong: float
    max_attempts: int = 6

    def work(self, problem: Problem, rng: random.Random) -> str:
        """A completion for the problem's prompt."""
        attempts: list[str] = []
        while True:
            attempts.append(self._attempt(problem, rng))
            doubt = self.doubt_right if is_right(problem.prompt, attempts[-1]) else self.doubt_wrong
            if len(attempts) == self.max_attempts or rng.random() >= doubt:
                return "?".join(attempts)

    def _attempt(self, problem: Problem, rng: random.Random) -> str:
        slip = self.slip_alone if problem.num_digits == 1 else self.slip
        steps, digits, carry = [], "", 0
        a, b = (str(number)[::-1].ljust(problem.num_digits, "0") for number in (problem.a, problem.b))
        for x, y in zip(a, b, strict=True):
            total = int(x) + int(y) + carry
            if rng.random() < slip:
                total = abs(total + rng.choice((-1, 1)))  # 0 slips to 1 only
            steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
            carry, digit = divmod(total, 10)
            digits = f"{digit}{digits}"
        answer = int(f"{carry}{digits}")
        return ";".join([*steps, str(answer)])


PUPIL = Pupil(slip_alone=0.05, slip=0.35, doubt_right=0.1, doubt_wrong=0.35)


def sample_problems(num_problems: int, *, num_digits: int | Sequence[int], seed: int) -> list[Problem]:
    """Random problems.

    Args:
        num_problems: how many.
        num_digits: digits that both numbers have; of several one is drawn for each problem. One digit is 0 to 9, two are 10 to 99, ...
        seed: equal seeds give equal problems.
    """
    rng = random.Random(seed)
    choices = [num_digits] if isinstance(num_digits, int) else list(num_digits)

    def number(digits: int) -> int:
        return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)

    drawn = (rng.choice(choices) for _ in range(num_problems))
    return [Problem(a=number(digits), b=number(digits)) for digits in drawn]


def answer_of(text: str) -> int | None:
    """The answer that a completion gives: the number after the last ";" of its last attempt, None when that is unfinished or no number."""
    _, separator, answer = text.rpartition("?")[2].rpartition(";")
    return int(answer) if separator and answer.isascii() and answer.isdigit() else None


def is_right(prompt: str, text: str) -> bool:
    """Whether a completion answers its prompt with the true sum.

    Raises:
        ValueError: the prompt is no addition.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"the prompt {prompt!r} is no addition\nneeded is two numbers as in '12+7='\ntake prompts from sample_problems")
    return answer_of(text) == int(match[1]) + int(match[2])


def reward(prompt: str, text: str) -> float:
    """1.0 for a right answer, else 0.0."""
    return float(is_right(prompt, text))
