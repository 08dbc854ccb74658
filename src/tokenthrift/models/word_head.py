"""A small head on a frozen encoder that says what each word of a text is worth to a language model."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import ThriftError
from ..ops.tokens import Span, encode
from .token_classifier import chunks

WEIGHTS, CARD = "head.safetensors", "card.json"
FEATURES = 16
"""What :func:`surface` says of a word."""


class WordHead(nn.Module):
    """What two things cost, in nats a token of the word, as a language model would say: to guess the word, and to
    guess what follows without it.

    Args:
        dim: width of the encoder's hidden states.
        layers: which of them are read; 0 is what the encoder's layers get.
        width: of the hidden layer.
        later: weight of the second cost in a word's worth.
    """

    def __init__(self, dim: int, layers: Sequence[int], width: int = 128, later: float = 1.0) -> None:
        super().__init__()
        self.dim, self.layers, self.width, self.later = dim, tuple(layers), width, later
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.layers)
        self.read = nn.Linear(dim * len(self.layers) + FEATURES, width)
        # A word's neighbours, in this order whatever the chunk: three words to each side.
        self.around = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 2)
        self.drop = nn.Dropout(0.2)

    def forward(self, states: Tensor, features: Tensor) -> Tensor:
        """``(words, 2)`` from ``(words, layers, dim)`` and ``(words, FEATURES)``, in the order of the text."""
        parts = [norm(states[:, i]) for i, norm in enumerate(self.norms)]
        read = nn.functional.gelu(self.read(self.drop(torch.cat([*parts, features], dim=-1))))
        near = read + self.around(read.T[None])[0].T
        costs: Tensor = self.out(self.drop(near + nn.functional.gelu(self.mix(near))))
        return costs

    def worth(self, costs: Tensor) -> Tensor:
        """One number a word, from what :meth:`forward` gives."""
        return costs[:, 0].clamp(min=0) + self.later * costs[:, 1].clamp(min=0)


class WordScorer:
    """Says what the words of a text of any length are worth: the encoder reads it in chunks, the head all words.

    Args:
        encoder: a ``transformers`` encoder, the one that the head was trained on.
        tokenizer: its fast tokenizer.
        head: the head.
        window: tokens that the encoder reads at once, special ones included.
    """

    def __init__(self, encoder: Any, tokenizer: Any, head: WordHead, *, window: int = 256) -> None:
        config = encoder.config
        if config.hidden_size != head.dim or config.num_hidden_layers < max(head.layers):
            raise ThriftError(
                f"the head reads layers {', '.join(map(str, head.layers))} of {head.dim} numbers, and "
                f"{type(encoder).__name__} has {config.num_hidden_layers} of {config.hidden_size}: give its own encoder"
            )
        self.encoder, self.tokenizer, self.head = encoder, tokenizer, head.eval()
        self.window = min(window, getattr(config, "max_position_embeddings", window))

    def __repr__(self) -> str:
        return f"<word head on {type(self.encoder).__name__}>"

    @torch.inference_mode()
    def worth(self, text: str, units: Sequence[Span]) -> list[tuple[float, int]]:
        """Of each word: nats, a token, that a language model would pay if it were gone; and its tokens here.

        Args:
            text: any text.
            units: its words, in order, that tile it.
        """
        if not units:
            return []
        states, tokens = self.states(text, units)
        worth = self.head.worth(self.head(states, surface(text, units)))
        return list(zip(worth.tolist(), tokens.tolist(), strict=True))

    @torch.no_grad()
    def states(self, text: str, units: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """``(words, layers, dim)``, the means over each word's tokens, 0 where it has none; and their counts."""
        ids, spans = encode(self.tokenizer, [text])[0]
        head, stops = self.head, [text[end - 1 : end] in ".!?。！？\n" for _, end in spans]
        ends = [end for _, end in units]
        owner = torch.tensor([min(bisect_right(ends, end - 1), len(ends) - 1) for _, end in spans], dtype=torch.long)
        total = torch.zeros(len(units), len(head.layers), head.dim)
        before, behind = ([] if i is None else [i] for i in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id))
        around = len(before) + len(behind)
        for batch in _batches(chunks(stops, self.window - around), self.window):
            width = max(end - start for start, end in batch) + around
            rows = torch.full((len(batch), width), self.tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(rows)
            for row, (start, end) in enumerate(batch):
                piece = [*before, *ids[start:end], *behind]
                rows[row, : len(piece)] = torch.tensor(piece)
                mask[row, : len(piece)] = 1
            device = self.encoder.device
            out = self.encoder(
                input_ids=rows.to(device), attention_mask=mask.to(device), output_hidden_states=True
            ).hidden_states
            read = torch.stack([out[layer] for layer in head.layers], dim=2).float().cpu()
            for row, (start, end) in enumerate(batch):
                total.index_add_(0, owner[start:end], read[row, len(before) : len(before) + end - start])
        counts = torch.bincount(owner, minlength=len(units))
        return total / counts.clamp(min=1)[:, None, None], counts


def surface(text: str, units: Sequence[Span]) -> Tensor:
    """``(words, FEATURES)``: what each word looks like, and where else the text has it."""
    words = [text[start:end] for start, end in units]
    bare = [word.strip().lower() for word in words]
    ahead, seen, pairs = Counter(bare), Counter[str](), Counter[tuple[str, str]]()
    last: dict[str, int] = {}
    rows = []
    for i, (word, key) in enumerate(zip(words, bare, strict=True)):
        plain = word.strip()
        pair = (bare[i - 1] if i else "", key)
        ahead[key] -= 1
        rows.append(
            [
                math.log1p(len(plain)) / 2,
                float(any(c.isdigit() for c in plain)),
                float(plain.isdigit()),
                float(plain[:1].isupper()),
                float(len(plain) > 1 and plain.isupper()),
                float(any(c.isalpha() for c in plain)),
                float(plain.isalpha()),
                float(not any(c.isalnum() for c in plain)),
                float("\n" in word[: len(word) - len(word.lstrip())]),
                float(word[:1].isspace()),
                float(not plain.isascii()),
                float(i == 0 or words[i - 1].rstrip()[-1:] in ".!?:"),
                math.log1p(seen[key]),
                math.log1p(ahead[key]),
                math.log1p(pairs[pair]),
                1 / (1 + math.log1p(i - last[key])) if key in last else 0.0,
            ]
        )
        seen[key] += 1
        pairs[pair] += 1
        last[key] = i
    return torch.tensor(rows)


def _batches(parts: Sequence[Span], window: int) -> list[list[Span]]:
    """Chunks of similar length together: as many as have about 4,096 tokens."""
    rows = max(1, 4096 // window)
    ordered = sorted(parts, key=lambda part: part[0] - part[1])
    return [ordered[at : at + rows] for at in range(0, len(ordered), rows)]


# ---- folders of a head ----------------------------------------------------------------------------------------------


def save_word_head(head: WordHead, folder: Path, card: dict[str, Any]) -> None:
    """Write the weights, as float16, and the card, which gets what the head is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.to(torch.float16).contiguous() for name, value in head.state_dict().items()}, folder / WEIGHTS
    )
    made = {"dim": head.dim, "layers": list(head.layers), "width": head.width, "later": head.later}
    (folder / CARD).write_text(json.dumps({**card, "head": made}, indent=1) + "\n", encoding="utf-8")


@lru_cache(maxsize=2)
def load_word_scorer(folder: str | None = None) -> WordScorer:
    """The scorer of a folder with a head; None = of the head that comes with the library. Kept for the next text.

    Raises:
        ThriftError: the folder has no head, or a damaged one.
    """
    from .pairs import open_pair

    where = Path(str(files("tokenthrift").joinpath("data/word_head"))) if folder is None else Path(folder).expanduser()
    try:
        card = json.loads((where / CARD).read_text(encoding="utf-8"))
        head = WordHead(**card["head"])
        head.load_state_dict({name: value.float() for name, value in load_file(where / WEIGHTS).items()})
    except FileNotFoundError as error:
        raise ThriftError(
            f"{where} has no {Path(str(error.filename)).name}: give a folder that training made"
        ) from None
    except Exception as error:  # safetensors and torch raise nearly every type for damaged files
        said = str(error).strip().split("\n")[0]
        raise ThriftError(f"the word head in {where} cannot be read ({said}): train or install it again") from None
    return WordScorer(*open_pair(card["encoder"]), head)
