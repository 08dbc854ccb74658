"""VocabTrim: count which tokens a target writes, so that a draft model's output layer needs rows for those alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ThriftError


@dataclass(frozen=True)
class TokenCounts:
    """How often a model wrote each token.

    Attributes:
        vocabulary: tokens that the model has.
        counts: of those that it wrote, how often.
        always: tokens to keep whatever their count: ends of sequence and other special ones.
    """

    vocabulary: int
    counts: dict[int, int]
    always: tuple[int, ...] = ()

    def top(self, size: int | None = None) -> set[int]:
        """The ``size`` most frequent tokens (None: all that were seen; of equal ones the lower ids) and ``always``."""
        order = sorted(self.counts, key=lambda token: (-self.counts[token], token))
        return {*order[:size], *self.always}

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads."""
        data = {
            "vocabulary": self.vocabulary,
            "always": list(self.always),
            "counts": {str(token): count for token, count in sorted(self.counts.items())},
        }
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TokenCounts:
        """Read what :meth:`save` wrote. Raises ThriftError for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            counts = {int(token): int(count) for token, count in data["counts"].items()}
            found = cls(int(data["vocabulary"]), counts, tuple(map(int, data["always"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise ThriftError(
                f"cannot read token counts from {fspath(path)} ({said}): make them with calibrate_vocabulary"
            ) from None
        if not all(0 <= token < found.vocabulary for token in (*found.counts, *found.always)):
            raise ThriftError(f"{fspath(path)} counts tokens that its vocabulary of {found.vocabulary:,} does not have")
        return found


@torch.inference_mode()
def calibrate_vocabulary(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    raw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TokenCounts:
    """Count the tokens that ``model``, the target, writes after ``prompts``, greedily.

    The paper found text that the target generates better for this than text of the draft model or of others. Prompts
    should be like those that the draft model will be used for.

    Args:
        model, tokenizer: the target.
        prompts: texts, each wrapped in the tokenizer's chat template if it has one, unless ``raw``.
        max_new_tokens: written after each prompt, less where it ends by itself.
        progress: called with the number of prompts done and of all.

    Raises:
        ThriftError: no prompt, or an empty one.
    """
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ThriftError("calibrate_vocabulary needs at least one prompt, and no empty ones")
    counts: Counter[int] = Counter()
    for done, prompt in enumerate(prompts, start=1):
        if raw or not getattr(tokenizer, "chat_template", None):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            message = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        counts.update(out[0, inputs["input_ids"].shape[1] :].tolist())
        if progress is not None:
            progress(done, len(prompts))
    ends = model.generation_config.eos_token_id
    always = {
        *getattr(tokenizer, "all_special_ids", ()),
        *([] if ends is None else torch.tensor(ends).view(-1).tolist()),
    }
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    return TokenCounts(size, dict(counts), tuple(sorted(token for token in always if 0 <= token < size)))
