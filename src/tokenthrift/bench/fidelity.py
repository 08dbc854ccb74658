"""How far a plan moves a model's outputs on one input, and what it costs: what a search for budgets compares."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import apply
from ..core.errors import ThriftError
from ..core.plan import Plan
from ..core.session import Session, StageRecord
from ..core.tokenmap import TokenMap
from ..models.decoder import context_length
from ..models.encoder import find_encoder, part
from ..models.images import open_image
from . import metrics
from .data import Data, Document
from .loading import Loaded, digest
from .tasks import pick, token_ends

TEXT_TOKENS, CONTINUATION = 512, 32
"""Length of the texts for language models; so many more tokens are predicted from the reduced cache."""


class Measured(NamedTuple):
    """``loss`` against the unmodified model (0 = the same), the plan's cost, and the cost without it."""

    loss: float
    cost: float
    dense: float


class Fidelity:
    """Some inputs of one model, which outputs are compared on.

    Attributes:
        inputs: what the outputs are compared on.
        unit: what costs are: ``FLOPs`` (analytic, of the layers) or ``cache bytes``.
        loss: what the loss is, in words.
    """

    inputs: Sequence[Any]
    unit = "FLOPs"
    loss = ""

    def measure(self, plan: Plan, i: int) -> Measured:
        """A plan on the input of this index."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.inputs)

    def fingerprint(self) -> str:
        """Of the inputs as the model gets them."""
        tensors = (t for item in self.inputs for t in (item.values() if isinstance(item, dict) else item))
        return digest(f"{tuple(t.shape)}{t.double().sum():.9e}{t.flatten()[-1]:.9e}" for t in tensors)

    def cost(self, session: Session, stage: str) -> tuple[float, float]:
        """With the plan and without it; 0 where nothing was counted."""
        report = session.report()
        if self.unit == "FLOPs":
            return report.flops, report.flops_dense
        record = report.stages.get(stage, StageRecord())
        return float(record.bytes_after), float(record.bytes_before)


class EncoderFidelity(Fidelity):
    """1 − cosine of the output features: of CLS, and the mean over all other tokens, half each.

    Where tokens were merged each has the features of the one it went into; where they were dropped, none (cosine 0).
    """

    loss = "1 - cosine of CLS and other features"

    def __init__(self, model: Any, inputs: Sequence[dict[str, Tensor]], prefix: int) -> None:
        """``prefix`` is the number of leading tokens that are no patches, the first of which is CLS; may be 0."""
        found = find_encoder(model)
        if found is None:
            raise ThriftError(
                f"{type(model).__name__} has no encoder of a known family whose features could be compared"
            )
        # The encoder alone, whatever the model around it returns.
        self.model, self.encoder = model, found[0]
        self.inputs, self.prefix = inputs, prefix
        self._dense: dict[int, Tensor] = {}

    def measure(self, plan: Plan, i: int) -> Measured:
        if i not in self._dense:
            with torch.no_grad():
                self._dense[i] = self._features(self.encoder(**self.inputs[i]))
        with torch.no_grad(), apply(plan, self.model) as session:
            features = self._features(self.encoder(**self.inputs[i]))
        map = session.provenance().get("vision")
        if isinstance(map, TokenMap) and features.shape[1] == map.n_out != map.n_in:
            features = map.unmerge(features)
        cosine = torch.nn.functional.cosine_similarity(features, self._dense[i], dim=-1)[0]
        rest = float(cosine[self.prefix :].mean())
        alike = (float(cosine[0]) + rest) / 2 if self.prefix else rest
        return Measured(1 - alike, *self.cost(session, "vision"))

    @staticmethod
    def _features(out: Any) -> Tensor:
        return out.last_hidden_state.to(torch.float32)


class LanguageFidelity(Fidelity):
    """KL divergence of the next-token distributions after a prompt and along its true continuation.

    The prompt's forward makes the cache, reduced where the plan says so, and the continuation is read through it. So
    every stage of a language model shows: what changes the prompt's own states, and what only changes the cache.
    """

    loss = "KL divergence of the next-token distributions (nats)"

    def __init__(self, model: Any, inputs: Sequence[tuple[Tensor, Tensor]], stage: str) -> None:
        """``inputs`` are ids ``(1, tokens)`` of prompts and continuations; the cost counted is that of ``stage``."""
        self.model, self.inputs, self.stage = model, inputs, stage
        self.unit = "cache bytes" if stage == "cache" else "FLOPs"
        self._dense: dict[int, Tensor] = {}

    def measure(self, plan: Plan, i: int) -> Measured:
        if i not in self._dense:
            self._dense[i] = self._logits(i)
        with apply(plan, self.model) as session:
            logits = self._logits(i)
        return Measured(metrics.kl_divergence(self._dense[i], logits), *self.cost(session, self.stage))

    @torch.no_grad()
    def _logits(self, i: int) -> Tensor:
        head, tail = self.inputs[i]
        first = self.model(head, use_cache=True, logits_to_keep=1)
        rest = self.model(tail[:, :-1], past_key_values=first.past_key_values)
        return torch.cat([first.logits[0, -1:], rest.logits[0]])


# ---- the inputs of a model ------------------------------------------------------------------------------------------


def fidelity_of(loaded: Loaded, data: Data, stage: str, count: int, seed: int) -> Fidelity:
    """Up to ``count`` inputs of the kind that a model reads, drawn from the data.

    Raises ThriftError for data of another kind, or too little of it: tuning needs two inputs at least.
    """
    if loaded.kind == "visual":
        raise ThriftError(f"{loaded.label} cannot be tuned yet: tune its encoder, or a language model")
    if loaded.kind == "language":
        texts = _texts(loaded, data, count, seed, CONTINUATION)
        pairs = [(_ids(loaded, head), _ids(loaded, tail, add_special_tokens=False)) for head, tail in texts]
        return LanguageFidelity(loaded.model, pairs, stage)
    if hasattr(loaded.processor, "convert_ids_to_tokens"):  # a tokenizer, so an encoder of text
        texts = _texts(loaded, data, count, seed, 4)
        return EncoderFidelity(loaded.model, [{"input_ids": _ids(loaded, head)} for head, _ in texts], prefix=1)
    images = [{"pixel_values": image} for image in _images(loaded, data, count, seed)]
    return EncoderFidelity(loaded.model, images, _prefix(loaded.model, images[0]))


def _images(loaded: Loaded, data: Data, count: int, seed: int) -> list[Tensor]:
    if loaded.processor is None:
        raise ThriftError(f"{loaded.label} is a vision model: pass its image processor as processor=")
    if not data.images and (data.documents or data.prompts):
        raise ThriftError(f"{loaded.label} reads images: give --data files that end in .jpg, .png or .webp")
    _check_count(len(data.images), count, "images")
    paths = random.Random(seed).sample(sorted(data.images), min(len(data.images), count))
    encoded = (loaded.processor(images=open_image(path), return_tensors="pt") for path in paths)
    return [image["pixel_values"].to(loaded.model.device, loaded.model.dtype) for image in encoded]


@torch.no_grad()
def _prefix(model: Any, image: dict[str, Tensor]) -> int:
    """How many tokens an encoder puts in front of the patches."""
    found = find_encoder(model)
    if found is None:
        return 0
    encoder, family = found
    grid = []
    hook = part(encoder, str(family.patches)).register_forward_hook(lambda _, args, out: grid.append(out.shape[-2:]))
    try:
        tokens = encoder(**image).last_hidden_state.shape[1]
    finally:
        hook.remove()
    return int(tokens - grid[0].numel())


def _texts(loaded: Loaded, data: Data, count: int, seed: int, tail: int) -> list[tuple[str, str]]:
    """Pieces of the documents, and of the prompts: a head and the ``tail`` tokens that follow it."""
    if not callable(loaded.processor):
        raise ThriftError(f"{loaded.label} reads text: pass its tokenizer as processor=")
    texts = [*data.documents, *(Document(prompt.name, prompt.text) for prompt in data.prompts)]
    if not texts:
        raise ThriftError(f"{loaded.label} reads text, not images: give text, Markdown or JSONL files")
    room = context_length(loaded.model) or 10**9
    length = min(TEXT_TOKENS, room - tail - 2)  # [CLS] and [SEP], or the like, come on top
    pieces = pick(texts, token_ends(loaded.processor), count, length, tail, random.Random(seed))
    _check_count(len(pieces), count, "texts of some 20 words or more")
    return [(head, rest) for _, head, rest in pieces]


def _ids(loaded: Loaded, text: str, **settings: Any) -> Tensor:
    encoded = loaded.processor(text, verbose=False, **settings)["input_ids"]
    return torch.tensor([encoded], device=loaded.model.device)


def _check_count(found: int, count: int, what: str) -> None:
    if min(found, count) < 2:
        raise ThriftError(
            f"tuning needs at least 2 {what}, some to search on and some held out; here there are {min(found, count)}"
        )
