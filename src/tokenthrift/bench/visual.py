"""Measuring one plan on one image of a vision-language model: which questions it still answers, and what it saves."""

from __future__ import annotations

from functools import reduce
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..api import apply
from ..core.plan import Plan
from ..core.tokenmap import TokenMap
from ..models.connector_features import map_up_to
from .language import Clock, cache_bytes
from .scene_questions import WORDINGS, Question
from .seeing import Asked, encode, evaluate, prompt, repeated

KINDS = {kind: f"share of exact answers to questions such as: {wordings[0]}" for kind, wordings in WORDINGS.items()}
"""What the scores mean."""
NEW_TOKENS = 4


class VisualBench:
    """Measures plans on a vision-language model that answers questions about scenes."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def measure(self, plan: Plan, asked: Asked) -> dict[str, Any]:
        """Scores of all questions about the image; tokens, KV bytes and times of the first.

        Times begin before the encoder. It runs once for all questions, so that there is time for many of them.
        ``compress_s`` is the time that the methods of the connector and prefill stages took to choose.
        """
        inputs = self._inputs(asked, asked.questions[0])
        pixels = inputs.pop("pixel_values")
        with apply(plan, self.model, processor=self.processor) as session:
            clock = Clock(self._now)
            start = self._now()
            encoded = encode(self.model, pixels)
            inputs["mm_encoder_outputs"] = {"image": repeated(encoded, 1)}
            out = self.model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock, return_dict_in_generate=True
            )
            end = self._now()
            report, maps = session.report(), session.provenance()
            answers = evaluate(self.model, self.processor, [asked], encoded=encoded, new_tokens=NEW_TOKENS)
        before = inputs["input_ids"].shape[1]
        new, first_at = out.sequences.shape[1] - before, clock.first or end
        # Plans of other stages than the connector's leave the prompt as long as it is.
        connector = maps.get("connector")
        return {
            "tokens_before": before,
            "tokens": int(connector.mask[0].sum()) if isinstance(connector, TokenMap) else before,
            "kv_bytes": cache_bytes(out.past_key_values),
            "compress_s": sum(report.stages[s].seconds for s in ("connector", "prefill") if s in report.stages),
            "ttft_s": first_at - start,
            "decode_ms": 1e3 * (end - first_at) / max(new - 1, 1),
            "seconds": end - start,
            "scores": [[kind, float(right)] for kind, right in zip(answers.kinds, answers.right, strict=True)],
        }

    @torch.inference_mode()
    def shown(self, plan: Plan, asked: Asked, question: Question) -> tuple[TokenMap | None, str]:
        """What a plan made of an image's patches when it was asked one question, ``(1,)``, and what it answered."""
        inputs = self._inputs(asked, question)
        with apply(plan, self.model, processor=self.processor) as session:
            out = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            left = patches(session, (inputs["input_ids"][0] == self.processor.image_token_id).nonzero().squeeze(-1))
        [answer] = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return left, answer.strip()

    def grid(self, asked: Asked) -> tuple[int, int]:
        """Rows and columns of the image's patches."""
        patch = self.processor.image_processor.patch
        return asked.image.size[1] // patch, asked.image.size[0] // patch

    def _inputs(self, asked: Asked, question: Question) -> Any:
        text = prompt(question.text)
        inputs = self.processor(images=asked.image, text=text, size=asked.image.size[0]).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return perf_counter()


def patches(session: Any, columns: Tensor) -> TokenMap | None:
    """From an image's patches to the tokens that are left of them, over all stages with one map; None without any.

    Args:
        session: after one prompt with one image, read by an encoder that gives the connector all tokens but CLS.
        columns: of the prompt, one for each patch.
    """
    maps, encoder = session.provenance(), session.maps("vision")
    chain = [maps[s] for s in ("connector", "prefill") if isinstance(maps.get(s), TokenMap)]
    if not chain and not encoder:
        return None
    group = reduce(TokenMap.then, chain).owner[0, columns].cpu() if chain else torch.arange(len(columns))
    [picture] = session.adapter.pictures() or [None]
    merged = map_up_to(encoder, 1 + len(picture.columns)) if picture is not None else None
    if merged is not None:  # a token of the encoder stands at the patch that is its anchor; CLS is the first
        token = merged.owner[0, 1:].cpu()
        stands = merged.anchors[0].cpu()[token.clamp(min=0)] - 1
        group = torch.where((token >= 0) & (stands >= 0), group[stands.clamp(min=0)], -1)
    kept, number = group[group >= 0].unique(return_inverse=True)
    group[group >= 0] = number
    return TokenMap.merge(group.unsqueeze(0), n_out=len(kept))
