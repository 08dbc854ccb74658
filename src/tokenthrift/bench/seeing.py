"""How well a vision-language model answers questions about held-out scenes: exact answers, by kind of question.

model, processor = tt.load("thrift-vlm")
asked = questions(seed=0, count=1000)
print(evaluate(model, processor, asked))
with tt.apply(plan, model):
    print(evaluate(model, processor, asked))
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ThriftError
from .metrics import share_interval
from .scene_questions import Question, ask
from .scenes import SIZE, Collection, draw, held_out, lay_out


@dataclass(frozen=True)
class Asked:
    """Questions about one image."""

    image: Any
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answers:
    """What a model answered: one entry a question; ``images`` says which image it was about."""

    texts: tuple[str, ...]
    right: tuple[bool, ...]
    kinds: tuple[str, ...]
    images: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """The share of the questions that were answered exactly."""
        return sum(self.right) / len(self.right)

    @property
    def by_kind(self) -> dict[str, float]:
        """The share of every kind."""
        found = defaultdict(list)
        for kind, right in zip(self.kinds, self.right, strict=True):
            found[kind].append(right)
        return {kind: sum(right) / len(right) for kind, right in found.items()}

    def interval(self, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the accuracy. Images are drawn, since questions about one are not independent."""
        sums = np.bincount(self.images, self.right)
        counts = np.bincount(self.images)
        return share_interval(sums, counts, seed, draws, level)

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "questions": len(self.right),
            "images": len(set(self.images)),
            "accuracy": self.accuracy,
            "interval": list(self.interval()),
            "by_kind": self.by_kind,
        }


def prompt(question: str, image: bool = True) -> str:
    """The prompt of a question, as thrift-vlm was trained on it."""
    return f"{'<image> ' if image else ''}{question} answer:"


def questions(seed: int = 0, count: int = 1000, size: int = SIZE, collection: Collection | None = None) -> list[Asked]:
    """Scenes with questions about them, one of every kind that a scene allows: the same for the same seed.

    Args:
        seed: of everything that is drawn.
        count: of questions.
        size: pixels a side of the images.
        collection: what scenes are made of, if not the items and backgrounds that no training saw.

    Raises:
        ThriftError: a count below 1.
    """
    if count < 1:
        raise ThriftError(f"there must be at least 1 question, not {count}")
    collection = collection or held_out()
    used: Counter[tuple[str, str]] = Counter()
    found: list[Asked] = []
    while count > 0:
        rng = random.Random(f"held out {seed} {len(found)}")
        scene = lay_out(rng, collection)
        asked = ask(scene, rng, 1, used)[:count]
        found.append(Asked(draw(scene, collection, size), tuple(asked)))
        count -= len(asked)
    return found


def blind(asked: Iterable[Asked]) -> dict[str, float]:
    """The accuracy, by kind and of "all", of always giving the kind's most frequent answer: no image is needed."""
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for one in asked:
        for question in one.questions:
            given[question.kind][question.answer] += 1
    best = {kind: answers.most_common(1)[0][1] for kind, answers in given.items()}
    shares = {kind: best[kind] / answers.total() for kind, answers in given.items()}
    return shares | {"all": sum(best.values()) / sum(answers.total() for answers in given.values())}


def encode(model: Any, pixels: Any) -> Any:
    """Features of an image, (1, 3, height, width), as ``generate(mm_encoder_outputs={"image": ...})`` takes them."""
    return model.get_image_features(pixels, return_dict=True)


def repeated(encoded: Any, copies: int) -> Any:
    """The features for so many prompts about the same image."""
    again = copy(encoded)
    again.pooler_output = [*encoded.pooler_output] * copies
    return again


def evaluate(
    model: Any,
    processor: Any,
    asked: Iterable[Asked],
    *,
    share: bool = True,
    encoded: Any = None,
    new_tokens: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Greedy answers; all questions about an image are one batch.

    Args:
        model: a LLaVA, with a plan applied or without.
        processor: makes its inputs, as `models.visual_processor.VisualProcessor` does.
        asked: what `questions` gives.
        share: compute the image's features once for all of its questions. Without it the image is given with each of
            them, as users do.
        encoded: what `encode` gave for the image, if there is just one; it is shared then.
        new_tokens: so many tokens are written at most.
        progress: is told the number of questions answered so far.
    """
    import torch

    texts: list[str] = []
    right: list[bool] = []
    kinds: list[str] = []
    images: list[int] = []
    for number, one in enumerate(asked):
        size = one.image.size[0]  # as drawn: the processor's own size would shrink a larger canvas
        copies = len(one.questions)
        inputs = processor(
            images=[one.image] * copies, text=[prompt(question.text) for question in one.questions], size=size
        ).to(model.device)
        pixels = inputs.pop("pixel_values").to(model.dtype)
        with torch.inference_mode():
            if share:
                inputs["mm_encoder_outputs"] = {"image": repeated(encoded or encode(model, pixels[:1]), copies)}
            else:
                inputs["pixel_values"] = pixels
            out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        written = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, text in zip(one.questions, written, strict=True):
            texts.append(text.strip())
            right.append(text.strip() == question.answer)
            kinds.append(question.kind)
            images.append(number)
        if progress is not None:
            progress(len(texts))
    if not texts:
        raise ThriftError("there are no questions: give what `questions()` returns")
    return Answers(tuple(texts), tuple(right), tuple(kinds), tuple(images))
