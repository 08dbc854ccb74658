"""Training an encoder to tell the words that the teacher kept from those that it left out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...core.errors import ThriftError
from ...models.packs.quiet import quiet
from ...models.token_classifier import TokenClassifier, chunks
from ...ops.tokens import Span, encode

IGNORED = -100
"""The label of special tokens and padding: they are no part of the loss. In the authors' code they are."""


@dataclass(frozen=True)
class Report:
    """How training went.

    Attributes:
        losses: mean loss of each epoch.
        accuracies: share of the held-out tokens that are labelled as the teacher would, after each epoch.
        base: what labelling all alike would reach.
        best: the epoch, counted from 0, whose weights were kept.
        samples, held_out: how many were learned from, and how many tested on.
    """

    losses: list[float]
    accuracies: list[float]
    base: float
    best: int
    samples: int
    held_out: int


def train(
    model: Any,
    tokenizer: Any,
    samples: Sequence[tuple[str, Sequence[Span], Sequence[bool]]],
    *,
    epochs: int = 10,
    lr: float = 1e-5,
    batch_size: int = 10,
    held_out: float = 0.2,
    window: int = 512,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    out: str | PathLike[str] | None = None,
) -> Report:
    """Fine-tune a model for token classification, in place; in the end it has the weights of its best epoch.

    Every token has its word's label, whatever the tokenizer makes of words. Longer texts are cut into windows. The
    rest are the authors' settings: Adam, its learning rate, the batch and the number of epochs.

    Args:
        model: a ``transformers`` model for token classification; 1 is the label of words that stay.
        tokenizer: its fast tokenizer.
        samples: texts, their words, and whether each stayed.
        held_out: share of the samples that are only tested on.
        seed: of what is held out, and of the order.
        progress: called with (steps done, steps in all, loss).
        out: a folder to save model and tokenizer in.

    Raises:
        ThriftError: there are too few samples, or a setting makes no sense.
    """
    if epochs < 1 or batch_size < 1 or not 0 < held_out < 1:
        raise ThriftError("training needs at least one epoch, a batch of at least 1, and held_out between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator).tolist()
    tested = max(1, round(len(samples) * held_out))
    if len(samples) - tested < 1:
        raise ThriftError(f"{len(samples)} samples are too few to train on and to test with: give at least two")
    judge = TokenClassifier(model, tokenizer, window=window)
    learned = [row for i in order[tested:] for row in rows_of(judge, *samples[i])]
    test = [row for i in order[:tested] for row in rows_of(judge, *samples[i])]

    losses: list[float] = []
    accuracies: list[float] = []
    best: dict[str, Tensor] = {}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * -(-len(learned) // batch_size)
    was_training = model.training
    step = 0
    for _ in range(epochs):
        model.train()
        shuffled = torch.randperm(len(learned), generator=generator).tolist()
        total = 0.0
        for start in range(0, len(shuffled), batch_size):
            logits, labels = _forward(model, tokenizer, [learned[i] for i in shuffled[start : start + batch_size]])
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            step += 1
            total += loss.item() * min(batch_size, len(shuffled) - start)
            if progress is not None:
                progress(step, steps, loss.item())
        losses.append(total / len(learned))
        accuracies.append(_accuracy(model.eval(), tokenizer, test, batch_size))
        if accuracies[-1] == max(accuracies) and accuracies.count(accuracies[-1]) == 1:
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    model.train(was_training)
    if out is not None:
        with quiet():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    kept = torch.cat([torch.tensor([x for x in labels if x != IGNORED]) for _, labels in test]).float().mean().item()
    chosen = accuracies.index(max(accuracies))
    return Report(losses, accuracies, max(kept, 1 - kept), chosen, len(samples) - tested, tested)


def for_tokens(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A model for token classification and its tokenizer, from a pack, folder or hub id; a new head is random.

    Raises:
        ThriftError: there is nothing of that name, or it is no encoder.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from ...models.packs import PACKS, pull

    torch.manual_seed(seed)
    source = pull(name) if name in PACKS else name
    try:
        with quiet():
            model = AutoModelForTokenClassification.from_pretrained(source, num_labels=2)
            return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise ThriftError(f"cannot train {name}: {said} Give an encoder's pack, folder or hub id.") from None


def rows_of(
    judge: TokenClassifier, text: str, words: Sequence[Span], labels: Sequence[bool]
) -> list[tuple[list[int], list[int]]]:
    """``(ids, labels)`` of the windows of a text, special tokens included."""
    if len(words) != len(labels):
        raise ThriftError(f"a sample has {len(words)} words and {len(labels)} labels: label it again")
    ids, spans = encode(judge.tokenizer, [text])[0]
    ends = [end for _, end in words]
    of_token = [int(labels[min(bisect_right(ends, end - 1), len(ends) - 1)]) for _, end in spans]
    before, behind = judge.specials
    stops = [text[end - 1 : end] in ".!?\n" for _, end in spans]
    return [
        ([*before, *ids[a:b], *behind], [IGNORED] * len(before) + of_token[a:b] + [IGNORED] * len(behind))
        for a, b in chunks(stops, judge.room)
    ]


def _forward(model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (tokens, of_token) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, : len(tokens)] = torch.tensor(of_token)
        mask[i, : len(tokens)] = 1
    device = model.device
    return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float(), labels.to(device)


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]], batch_size: int) -> float:
    right = total = 0
    for start in range(0, len(rows), batch_size):
        logits, labels = _forward(model, tokenizer, rows[start : start + batch_size])
        counted = labels != IGNORED
        right += int((logits.argmax(-1) == labels)[counted].sum())
        total += int(counted.sum())
    return right / max(total, 1)
