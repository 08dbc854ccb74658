"""The loop of speculative decoding: prefill, then draft, one forward, verify, roll the cache back, until done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import QuantizedCache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..core.errors import ThriftError
from .protocols import Drafter, DrafterFactory
from .verify import Stopper, Verifier


@dataclass
class DecodeStats:
    """Counts and times of one ``generate`` call. Tokens are counted per row: a batch of 8 that grew by 5 counts 5.

    Attributes:
        committed: tokens generated, which is the number of forwards that plain decoding takes.
        forwards: forwards of the model, the prefill included.
        drafts: forwards that verified a draft; ``drafted`` and ``accepted`` are the tokens in them.
        draft_seconds: time to propose; ``verify_seconds`` to run and judge the forwards after the prefill;
            ``prefill_seconds`` the prefill.
    """

    committed: int = 0
    forwards: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@torch.no_grad()
def speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    drafter_factory: DrafterFactory,
    on_done: Callable[[DecodeStats], None] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate with drafts, the same output as plain decoding in fewer forwards.

    ``partial(speculate, drafter_factory=method.start)`` is a ``custom_generate`` of transformers' ``generate``, which
    passes all arguments but the last two. Greedy decoding and sampling, batches (which move at the pace of the row that
    accepts least, so that rows stay aligned), left padding, a cache from an earlier turn, chunked prefill, logits
    processors, stopping criteria, streamers, ``output_scores`` and ``output_logits`` all act as in plain decoding. The
    tokens are those of plain decoding wherever a forward of several tokens gives the same logits as forwards of one:
    in float32 up to near-ties, in half precision more ties flip.

    Args:
        model: a decoder-only ``transformers`` model.
        input_ids: ``(batch, tokens)`` int64.
        drafter_factory: makes the drafter of a row from its prompt tokens.
        on_done: called once with the counts and times, when generation ended normally.

    Returns:
        ``(batch, tokens + committed)`` int64, or what plain decoding returns with ``return_dict_in_generate``.

    Raises:
        ThriftError: beam search and other modes, a cache that cannot be rolled back or none, ``output_attentions`` or
            ``output_hidden_states``, encoder-decoder models, several synchronised GPUs.
    """
    _refuse(model, generation_config, synced_gpus, model_kwargs)
    batch, length = input_ids.shape
    as_dict = generation_config.return_dict_in_generate
    stopper = Stopper(stopping_criteria, generation_config.max_length)
    pad = getattr(generation_config, "_pad_token_tensor", None)
    verifier = Verifier(
        logits_processor,
        stopper,
        sample=bool(generation_config.do_sample),
        pad=None if pad is None else int(pad),
        batch=batch,
        keep_scores=bool(as_dict and generation_config.output_scores),
        keep_logits=bool(as_dict and generation_config.output_logits),
    )
    stats = DecodeStats()
    text = torch.cat([input_ids, input_ids.new_empty(batch, _ROOM)], dim=1)
    drafters = [drafter_factory(row) for row in _prompts(input_ids, model_kwargs.get("attention_mask"))]
    draft: list[list[int]] = [[] for _ in range(batch)]

    start = perf_counter()
    outputs = model._prefill(
        input_ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    cache = outputs.past_key_values
    with _rollback(cache), model._optimize_model_for_decode():
        while True:
            drafted = len(draft[0])
            new = verifier(text, length, draft, outputs.logits[:, -drafted - 1 :])
            del outputs  # the logits of a step may be large
            length += len(new)
            cache.crop(len(new) - 1 - drafted)  # also with nothing to remove: sliding windows shrink here
            stats.committed += len(new)
            stats.forwards += 1
            stats.accepted += len(new) - 1
            now = perf_counter()
            if stats.forwards == 1:
                stats.prefill_seconds = now - start
            else:
                stats.verify_seconds += now - start
            if streamer is not None:
                for tokens in new:
                    streamer.put(torch.tensor(tokens))
            if verifier.finished:
                break

            start = perf_counter()
            model_kwargs = _grow(model, model_kwargs, len(new))
            for drafter, row in zip(drafters, zip(*new, strict=True), strict=True):
                drafter.extend(row)
            draft = _draft(drafters, verifier, stopper.max_length - length - 1)
            drafted = len(draft[0])
            stats.drafts += drafted > 0
            stats.drafted += drafted
            now = perf_counter()
            stats.draft_seconds += now - start

            start = now
            if text.shape[1] <= length + drafted:
                text = torch.cat([text, text.new_empty(batch, text.shape[1] + drafted)], dim=1)
            text[:, length : length + drafted] = torch.tensor(draft, dtype=text.dtype, device=text.device)
            outputs = _forward(model, text[:, : length + drafted], drafted, model_kwargs)

    if streamer is not None:
        streamer.end()
    if on_done is not None:
        on_done(stats)
    sequences = cast("LongTensor", text[:, :length].clone())
    if not as_dict:
        return sequences
    scores: Any = verifier.scores
    logits: Any = verifier.logits
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, past_key_values=cache)


def _forward(model: Any, text: Tensor, drafted: int, model_kwargs: dict[str, Any]) -> Any:
    """One forward of the last committed token and the draft that ends ``text``, with logits at each of them."""
    kwargs = _grow(model, model_kwargs, drafted) if drafted else model_kwargs
    inputs = model.prepare_inputs_for_generation(text, next_sequence_length=drafted + 1, **kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = drafted + 1
    return model(**inputs, return_dict=True)


def _grow(model: Any, model_kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A copy with attention mask, position ids and token types that cover ``tokens`` more tokens."""
    grown: dict[str, Any] = model._update_model_kwargs_for_generation(
        {}, dict(model_kwargs), is_encoder_decoder=False, num_new_tokens=tokens
    )
    return grown


_ROOM = 512  # columns that the text buffer has in advance


def _refuse(model: Any, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Raise ThriftError for what cannot be decoded with drafts."""
    if model.config.is_encoder_decoder:
        raise ThriftError(f"drafts need a decoder-only model, {type(model).__name__} is an encoder-decoder")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ThriftError(
            f"drafts work with greedy decoding and sampling, this call asks for {mode.value.replace('_', ' ')}: "
            "leave out num_beams, prompt_lookup_num_tokens, assistant_early_exit and their likes"
        )
    if synced_gpus:
        raise ThriftError("drafts do not work with synced_gpus: processes would disagree on the number of forwards")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ThriftError(f"drafts cannot return {name}: leave it out, or generate without the decode stage")
    if not model_kwargs.get("use_cache", True) or model_kwargs.get("past_key_values") is None:
        raise ThriftError("drafts need a key-value cache: leave out use_cache=False, and use a model that has a cache")


@contextmanager
def _rollback(cache: Any) -> Iterator[None]:
    """Make ``cache.crop`` able to take drafted tokens back; afterwards the cache records as little as before.

    Entered after the prefill: sliding windows then never keep more of the prompt than they must.
    """
    if isinstance(cache, QuantizedCache) or not cache.is_croppable:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ThriftError(
            f"drafts need a cache that can be rolled back, this one ({kinds}) cannot: leave out cache_implementation, "
            "or generate without the decode stage"
        )
    before = [(layer, layer.record_past) for layer in cache.layers if hasattr(layer, "record_past")]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, record_past in before:
            layer.record_past = record_past


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row, padding left out."""
    rows: list[list[int]] = input_ids.tolist()
    if mask is None or mask.dim() != 2 or mask.shape[1] < input_ids.shape[1] or not rows[0]:
        return rows
    real = mask[:, -input_ids.shape[1] :].tolist()
    return [[t for t, m in zip(row, keep, strict=True) if m] for row, keep in zip(rows, real, strict=True)]


def _draft(drafters: list[Drafter], verifier: Verifier, limit: int) -> list[list[int]]:
    """The rows' drafts, cut to the shortest; rows that are done draft padding."""
    rows: list[list[int] | None] = []
    for drafter, idle in zip(drafters, verifier.idle, strict=True):
        row = None if idle else _cut(drafter.propose(limit), limit, verifier.stopper.eos) if limit > 0 else []
        if row == []:  # one row without a draft stops them all
            return [[] for _ in drafters]
        rows.append(row)
    width = min(len(row) for row in rows if row is not None)
    return [[verifier.pad or 0] * width if row is None else row[:width] for row in rows]


def _cut(draft: list[int], limit: int, eos: set[int]) -> list[int]:
    """At most ``limit`` tokens, and none after an end of sequence."""
    draft = draft[:limit]
    end = next((i for i, t in enumerate(draft) if t in eos), len(draft))
    return draft[: end + 1]
