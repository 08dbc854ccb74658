"""The loop of speculative decoding: prefill, then draft, one forward, verify, roll the cache back, until done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..core.draft import NOTHING, Draft
from ..core.errors import ThriftError
from .planner import Planner
from .protocols import Drafters, Request, Start
from .rules import rule_of
from .runners import runner_of
from .verify import BY_ROW, Stopper, Text, Verdict, Verifier


@dataclass
class DecodeStats:
    """Counts and times of one ``generate`` call.

    Attributes:
        committed: tokens by which the longest row grew, which is the number of forwards that plain decoding takes.
        forwards: forwards of the model, the prefill included.
        drafts: forwards that verified drafts; ``drafted`` and ``accepted`` are the guesses in them, over all rows.
        draft_seconds: time to propose; ``verify_seconds`` to run and judge the forwards after the prefill;
            ``prefill_seconds`` the prefill.
        by_depth: how many guesses were verified and how many accepted, at depth 1, 2, ... of the drafts, in all rows.
        by_source: the same by where a guess came from.
        extra: what a method with a loop of its own counts, by name.
    """

    committed: int = 0
    forwards: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    by_depth: list[list[int]] = field(default_factory=list)
    by_source: dict[str, list[int]] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    def note(self, drafts: Sequence[Draft | None], verdicts: Sequence[Verdict]) -> None:
        """Count the guesses of a step."""
        for draft, verdict in zip(drafts, verdicts, strict=True):
            if draft is None or not len(draft):
                continue
            accepted = set(verdict.path)
            self.drafted += len(draft)
            self.accepted += len(accepted)
            for node, depth in enumerate(draft.depths):
                while len(self.by_depth) < depth:
                    self.by_depth.append([0, 0])
                for counts in (self.by_depth[depth - 1], self.by_source.setdefault(draft.source(node), [0, 0])):
                    counts[0] += 1
                    counts[1] += node in accepted


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
    start: Start,
    rule: str = "sample",
    tokenizer: Any = None,
    on_step: Callable[[list[Draft | None], list[Verdict]], None] | None = None,
    on_done: Callable[[DecodeStats], None] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate with drafts, the same output as plain decoding in fewer forwards.

    ``partial(speculate, start=each_row(method.start))`` is a ``custom_generate`` of transformers' ``generate``, which
    passes all arguments but the last ones. Greedy decoding and sampling, batches, left padding, a cache from an earlier
    turn, chunked prefill, logits processors, stopping criteria, streamers, ``output_scores`` and ``output_logits`` all
    act as in plain decoding. The tokens are those of plain decoding wherever a forward of several tokens gives the same
    logits as forwards of one: in float32 up to near-ties, in half precision more ties flip.

    The rows of a batch accept what each can, in one packed forward (:mod:`tokenthrift.models.packed`). They move at the
    pace of the one that accepts least where the model or its cache cannot be packed, and where something looks at the
    whole batch at once: a streamer, ``output_scores``, processors and criteria of your own.

    Args:
        model: a decoder-only ``transformers`` model.
        input_ids: ``(batch, tokens)`` int64.
        start: makes the batch's drafters from the prompts.
        rule: how guesses are judged when sampling; see :mod:`tokenthrift.decoding.rules`.
        tokenizer: the model's, for drafters that ask for it.
        on_step: called after every forward but the first with what was verified and what was committed, row by row.
        on_done: called once with the counts and times, when generation ended normally.

    Returns:
        ``(batch, tokens + committed)`` int64, or what plain decoding returns with ``return_dict_in_generate``.

    Raises:
        ThriftError: an empty prompt, beam search and other modes, a cache that cannot be rolled back or none,
            ``output_attentions`` or ``output_hidden_states``, encoder-decoder models, several synchronised GPUs.
    """
    _refuse(model, input_ids, generation_config, synced_gpus, model_kwargs)
    batch, as_dict = input_ids.shape[0], generation_config.return_dict_in_generate
    stopper = Stopper(stopping_criteria, generation_config.max_length)
    sample = bool(generation_config.do_sample)
    pad = getattr(generation_config, "_pad_token_tensor", None)
    keep_scores = bool(as_dict and generation_config.output_scores)
    keep_logits = bool(as_dict and generation_config.output_logits)
    one_by_one = (
        stopper.by_row
        and (stopper.pads or not stopper.reads_tensors)
        and streamer is None
        and not (keep_scores or keep_logits)
        and all(type(p) in BY_ROW for p in logits_processor)
    )
    verifier = Verifier(
        logits_processor,
        stopper,
        sample=sample,
        pad=None if pad is None else int(pad),
        batch=batch,
        rule=rule_of(rule),
        keep_scores=keep_scores,
        keep_logits=keep_logits,
    )
    stats, text = DecodeStats(), Text(input_ids, _ROOM)
    request = Request(model, logits_processor, sample, frozenset(stopper.ends), tokenizer)
    drafters = start(_prompts(input_ids, model_kwargs.get("attention_mask")), request)
    drafts: list[Draft | None] = [NOTHING] * batch
    drafting = 0.0

    began = perf_counter()
    outputs = model._prefill(
        input_ids, generation_config, model_kwargs, is_first_iteration=not generation_config.is_assistant
    )
    runner = runner_of(model, outputs.past_key_values, model_kwargs, input_ids)
    verifier.joint = batch == 1 or not (runner.free and one_by_one)
    planner = Planner(runner.free and (batch == 1 or not verifier.joint), model)
    logits: Sequence[Tensor] = outputs.logits[:, -1:]
    try:
        if hasattr(drafters, "attach"):
            drafters.attach(runner)
        with model._optimize_model_for_decode():
            while True:
                verdicts = verifier(text, drafts, logits)
                if stats.forwards:
                    runner.commit([verdict.cached for verdict in verdicts])
                drafters.observe(drafts, logits)
                del logits, outputs  # may be large
                stats.committed = max(text.lengths) - input_ids.shape[1]
                stats.forwards += 1
                now = perf_counter()
                if stats.forwards == 1:
                    stats.prefill_seconds = now - began
                else:
                    stats.verify_seconds += now - began
                    stats.note(drafts, verdicts)
                    planner.note(drafts, sum(len(v.tokens) for v in verdicts), drafting, now - began)
                    if on_step is not None:
                        on_step(drafts, verdicts)
                if streamer is not None:
                    for tokens in zip(*(verdict.tokens for verdict in verdicts), strict=True):
                        streamer.put(torch.tensor(tokens))
                if verifier.finished:
                    break

                began = perf_counter()
                drafters.extend([verdict.tokens for verdict in verdicts])
                drafts = _draft(drafters, planner, verifier, text, stopper)
                stats.drafts += any(draft is not None and len(draft) > 0 for draft in drafts)
                now = perf_counter()
                drafting = now - began
                stats.draft_seconds += drafting

                began = now
                last = [int(verdict.tokens[-1]) if verdict.tokens else 0 for verdict in verdicts]
                outputs = logits = runner.forward(last, drafts)
    finally:
        runner.close()

    if streamer is not None:
        streamer.end()
    if on_done is not None:
        on_done(stats)
    sequences = cast("LongTensor", text.all(verifier.pad or 0))
    if not as_dict:
        return sequences
    scores: Any = verifier.scores
    raw: Any = verifier.logits
    cache = model_kwargs["past_key_values"]
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=raw, past_key_values=cache)


def _draft(
    drafters: Drafters, planner: Planner, verifier: Verifier, text: Text, stopper: Stopper
) -> list[Draft | None]:
    """What to verify next, row by row; None for rows that are done."""
    limits = [
        None if idle else stopper.max_length - length - 1
        for idle, length in zip(verifier.idle, text.lengths, strict=True)
    ]
    if planner.rests():
        return [None if limit is None else NOTHING for limit in limits]
    proposed = [
        None if limit is None else draft.within(max(limit, 0), stopper.ends)
        for draft, limit in zip(drafters.propose(limits), limits, strict=True)
    ]
    return planner.cut(proposed)


_ROOM = 512  # columns that the text buffer has in advance


def _refuse(
    model: Any, input_ids: Tensor, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> None:
    """Raise ThriftError for what cannot be decoded with drafts."""
    if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise ThriftError("the prompt is empty: begin with a token, such as the beginning-of-sequence token")
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


def _prompts(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row, padding left out."""
    rows: list[list[int]] = input_ids.tolist()
    if mask is None or mask.dim() != 2 or mask.shape[1] < input_ids.shape[1] or not rows[0]:
        return rows
    real = mask[:, -input_ids.shape[1] :].tolist()
    return [[t for t, m in zip(row, keep, strict=True) if m] for row, keep in zip(rows, real, strict=True)]
