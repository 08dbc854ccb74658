"""Needle in a haystack: one sentence hidden at every depth of prompts of every length, and asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import ThriftError
from .haystack import Haystack, Puzzle
from .questions import Questions
from .tasks import PLACES, Case

MEANING = {
    "needle": "probability, a token, that the model gives to the code hidden in the prompt (geometric mean, by teacher "
    "forcing); guessing digits makes about 0.1",
}


@dataclass(frozen=True)
class NeedleSuite(Questions):
    """The grid of depths and lengths.

    All depths of a length share one text and one needle, so that nothing but the depth tells their cells apart.

    Args:
        depths: where the needle lies, in percent of the text before it: 0 is the beginning, 100 the end.
    """

    name: str = "needle"
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)

    note: ClassVar[str] = (
        "Needle in a haystack: a code of seven digits is hidden at every depth of prompts of every length, and asked "
        "for. Scores are the probability that the model gives to the code, a token (geometric mean, by teacher "
        "forcing): small models, which may fail to write it, still tell careful reductions from careless ones."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ThriftError("the depths must be percentages from 0 to 100, such as --depths 0,50,100")

    def ask(self, haystack: Haystack, seed: int) -> Iterator[tuple[Case, int]]:
        for length in sorted(set(self.lengths)):
            for sample in range(self.samples):
                for depth in sorted(set(self.depths)):
                    rng = random.Random(f"{seed} {sample}")
                    place, code = rng.choice(PLACES), str(rng.randrange(10**6, 10**7))
                    puzzle = Puzzle(
                        f"\n\nQuestion: What is the access code of the {place} office?\n"
                        f"Answer: The access code of the {place} office is",
                        f" {code}",
                        (code,),
                        hidden=((depth, f"The access code of the {place} office is {code}."),),
                    )
                    id = f"needle/{length}/{depth:g}%/{sample}"
                    facts = {"score": "probability", "cell": (f"{depth:g}%", str(length))}
                    later = self.question_later
                    yield haystack.case(id, "needle", puzzle, length, rng, later=later, **facts), length
