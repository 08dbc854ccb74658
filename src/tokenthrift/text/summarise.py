"""Summaries as prompt compression (TCRA-LLM, arXiv 2310.15556): a sequence-to-sequence model writes a shorter text.

A summary has words that the text does not have, so it is no selection of the text's characters: it is no method of the
text stage, and no plan can hold it. The paper's T5 is fine-tuned on summaries of several lengths, and is not public;
any other model of the kind will do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..models.pairs import as_pair, open_pair
from ..ops.tokens import count_tokens, encode
from .passages import passages, pieces, span_of
from .spans import join, sentences, words


@dataclass(frozen=True)
class Summary:
    """A text that was written in place of another; ``str()`` is the text.

    Attributes:
        text: the summary.
        original: the text before.
        tokens_before, tokens_after: counts by the tokenizer that was given, special tokens left out.
        seconds: time taken, loading of models left out.
    """

    text: str
    original: str = field(repr=False)
    tokens_before: int
    tokens_after: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens of the summary for each of the text."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    def __str__(self) -> str:
        return self.text


@torch.inference_mode()
def summarise(
    text: str, model: Any, rate: float = 0.35, *, tokenizer: Any = None, prompt: str = "summarize: ", window: int = 512
) -> Summary:
    """Let a sequence-to-sequence model write a shorter text.

    A long text is summarised passage by passage, each of whole sentences, and to the same share. The model writes
    greedily. Where the rate stops it, the sentence that it could not end is left out, unless it is the only one.

    Args:
        text: any length.
        model: a pack, folder or hub id of a sequence-to-sequence model, or (model, tokenizer).
        rate: the longest summary, as a share of the tokens (by the model's tokenizer) of each passage, in (0, 1]; an
            int is a number of tokens a passage.
        tokenizer: what tokens are counted by; the model's when None.
        prompt: what the model reads before each passage; T5's word by default.
        window: tokens of a passage with the prompt, at most.

    Raises:
        ThriftError: a rate outside these, or a model that is not of this kind or cannot be loaded.
    """
    budget = Budget.of(rate)
    given = as_pair("summarise", model)
    if given is None:
        raise ThriftError("summarise needs a sequence-to-sequence model: give a folder, hub id or (model, tokenizer)")
    writer, own = open_pair(given)
    if not getattr(writer.config, "is_encoder_decoder", False):
        raise ThriftError(f"summarise needs a sequence-to-sequence model such as T5, not {type(writer).__name__}")
    before = encode(own, [prompt])[0][0]
    room = window - len(before) - 2
    if room < 1:
        raise ThriftError(f"the prompt has {len(before)} tokens: summarise needs a window larger than {window}")

    start = time.perf_counter()
    units = words(text)
    alone = [span_of(units, part) for part in pieces(text, units, own, room)]
    written = []
    for part in passages(text, alone, own, room):
        shown = join(text, [span_of(alone, part)]).strip()
        longest = budget.tokens(count_tokens(own, shown))
        inputs = own(prompt + shown, return_tensors="pt", verbose=False).to(writer.device)
        out = writer.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
        )[0]
        said = own.decode(out, skip_special_tokens=True).strip()
        written.append(said if _has_ended(out, writer) else _whole_sentences(said))
    short = "\n".join(line for line in written if line)
    counter = own if tokenizer is None else tokenizer
    return Summary(
        text=short,
        original=text,
        tokens_before=count_tokens(counter, text),
        tokens_after=count_tokens(counter, short),
        seconds=time.perf_counter() - start,
    )


def _has_ended(out: torch.Tensor, writer: Any) -> bool:
    """Whether the model stopped by itself."""
    ends = writer.generation_config.eos_token_id
    return ends is not None and int(out[-1]) in (ends if isinstance(ends, list) else [ends])


def _whole_sentences(text: str) -> str:
    """Without the last sentence, unless that is all."""
    found = sentences(text)
    return join(text, found[:-1]).strip() if len(found) > 1 else text
