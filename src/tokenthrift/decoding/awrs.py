"""AWRS: generate under a constraint, asking about few tokens, with weights that say what the constraint cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..core.errors import ThriftError
from ..core.method import method
from .constraints import Constraint, Grammar, constraint_of
from .particles import Outcome, Population, generate
from .rejection import ALGORITHMS, draw, likeliest, possible
from .verify import Stopper


@method(
    "awrs",
    stage="decode",
    paper="Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling",
    arxiv="2504.05410",
)
class Awrs:
    """Generate only what a constraint accepts, by adaptive weighted rejection sampling and sequential Monte Carlo.

    **The output is not that of plain decoding**: it is drawn from the model's law given the constraint. Tokens are
    drawn until the constraint accepts one, instead of asking about the whole vocabulary, and each has a weight whose
    mean is the probability that the constraint left. With several particles those weights choose among continuations,
    which corrects the bias of masking token by token. Greedy decoding takes the likeliest token that is accepted, as
    under a mask.

    Args:
        regex: what the whole output has to match.
        json_schema: what it has to fulfil: JSON text, data, or the path of a ``.json`` file.
        constraint: or a callable ``accept(prefix, token) -> bool`` over token ids, asked about an end-of-sequence token
            whether the text may end; or an object of the protocol in :mod:`tokenthrift.decoding.constraints`.
        text: the callable gets the text so far and what the token adds, ``""`` at the end.
        particles: continuations of each prompt grown side by side. One of them is returned, drawn by weight.
        ess_threshold: resample when fewer than this share of the particles are effective; 0 never does.
        algorithm: ``"auto"``, ``"recursive"``, ``"geometric"`` or ``"improper"``; see
            :func:`tokenthrift.decoding.rejection.draw`.
        max_accepts: of geometric.
        max_rejects: questions answered with no after which a particle dies; None tries all tokens.
        seed: of all draws; None takes one from torch's generator.

    The token samplers give the numbers of the authors' code; they differ where less than 1e-5 of the law is left, where
    that code gives up. Resampling is systematic. A text that reaches ``max_new_tokens`` may be an incomplete one. The
    law is what logits processors leave of it: ``top_k``, 50 by default when sampling, may cut all that is accepted.

    Raises:
        ThriftError: none of the constraints, or several; a parameter outside its range; when generating, a constraint
            that nothing satisfies, no ``llguidance`` for a grammar, beams, ``output_scores`` and their likes.
    """

    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None
    constraint: Constraint | Callable[[Any, Any], bool] | None = None
    text: bool = False
    particles: int = 1
    ess_threshold: float = 0.5
    algorithm: str = "auto"
    max_accepts: int = 2
    max_rejects: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if sum(what is not None for what in (self.regex, self.json_schema, self.constraint)) != 1:
            raise ThriftError("awrs needs one of regex='...', json_schema='...' and constraint=accept")
        if self.particles < 1 or not 0 <= self.ess_threshold <= 1:
            raise ThriftError("awrs needs particles of at least 1 and an ess_threshold from 0 to 1")
        if self.max_accepts < 2 or (self.max_rejects is not None and self.max_rejects < 1):
            raise ThriftError("awrs needs max_accepts of at least 2 and max_rejects of at least 1")
        if self.algorithm not in ALGORITHMS:
            raise ThriftError(f"awrs has the algorithms {', '.join(ALGORITHMS)}, not '{self.algorithm}'")
        if self.constraint is not None:
            constraint_of(self.constraint, self.text)
        elif self.json_schema is not None:
            Grammar.json_schema(self.json_schema)

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        *,
        processor: Any = None,
        on_outcome: Callable[[Outcome], None] | None = None,
        on_done: Callable[[Any], None] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The decoding loop, as a ``custom_generate`` of transformers' ``generate``."""
        sample = bool(generation_config.do_sample)
        _refuse(self, model, generation_config, sample, streamer, model_kwargs)
        stopper = Stopper(stopping_criteria, generation_config.max_length)
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        rng = np.random.default_rng(seed)
        rejects = inf if self.max_rejects is None else self.max_rejects
        out = generate(
            model,
            input_ids,
            logits_processor,
            stopper,
            generation_config,
            streamer,
            starts=[self._start(model, processor, stopper.ends)] * len(input_ids),
            particles=self.particles,
            threshold=self.ess_threshold,
            choose=(
                (lambda p, accept: draw(p, accept, rng, self.algorithm, self.max_accepts, rejects))
                if sample
                else (lambda p, accept: likeliest(possible(p), accept))
            ),
            rng=rng,
            **model_kwargs,
        )
        if on_outcome is not None:
            on_outcome(out)
        if on_done is not None:
            on_done(out.stats)
        chosen = [p.tokens[int(rng.choice(self.particles, p=p.shares))] for p in out.populations]
        pad = getattr(generation_config, "_pad_token_tensor", None)
        new = input_ids.new_full((len(chosen), max(map(len, chosen))), 0 if pad is None else int(pad))
        for row, tokens in zip(new, chosen, strict=True):
            row[: len(tokens)] = row.new_tensor(tokens)
        sequences: Any = torch.cat([input_ids, new], dim=1)
        return (
            GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences
        )

    def _start(self, model: Any, processor: Any, ends: set[int]) -> Any:
        if self.constraint is not None:
            what = constraint_of(self.constraint, self.text)
        else:
            what = Grammar.json_schema(self.json_schema) if self.regex is None else Grammar.regex(self.regex)  # type: ignore[arg-type]
        tokenizer = getattr(processor, "tokenizer", processor)
        return what.start(tokenizer, int(model.config.get_text_config().vocab_size), frozenset(ends))


@dataclass(frozen=True)
class Constrained:
    """What :func:`constrained_generate` returns; lists are by particle.

    Attributes:
        text: of the particle drawn by weight.
        texts, tokens: of all; tokens include the end-of-sequence token.
        weights: normalised: an expectation under the law given the constraint is the weighted mean over particles.
        complete: whether the constraint lets the text end where it ended.
        log_evidence: log of an unbiased estimate of the probability that the model fulfils the constraint.
        checks: questions asked.
    """

    text: str
    texts: list[str]
    tokens: list[list[int]]
    weights: list[float]
    complete: list[bool]
    log_evidence: float
    checks: int


def constrained_generate(
    model: Any,
    processor: Any,
    prompt: str | list[int],
    accept: Constraint | Callable[[Any, Any], bool] | None = None,
    *,
    max_new_tokens: int = 64,
    seed: int | None = 0,
    generate: Mapping[str, Any] | None = None,
    **params: Any,
) -> Constrained:
    """Sample from a model under a constraint, and get every particle with its weight.

    Args:
        model: any ``transformers`` model that the ``awrs`` method runs on.
        processor: its tokenizer.
        prompt: text, or token ids.
        accept: the ``constraint`` of :class:`Awrs`; None with ``regex=`` or ``json_schema=``.
        generate: more arguments of ``model.generate``. The law is the model's own unless temperature, top_k, ... are
            given here.
        params: more parameters of :class:`Awrs`, e.g. ``particles=16``.

    Raises:
        ThriftError: see :class:`Awrs`; an empty prompt.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise ThriftError("the prompt is empty")
    made = Awrs.info.make(constraint=accept, seed=seed, **params)  # type: ignore[attr-defined]
    found: list[Outcome] = []
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    model.generate(
        torch.tensor([ids], device=model.device),
        custom_generate=partial(made.decode, processor=tokenizer, on_outcome=found.append),
        max_new_tokens=max_new_tokens,
        **{**plain, **(generate or {})},
    )
    population: Population = found[0].populations[0]
    texts = [
        "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True) for tokens in population.tokens
    ]
    shares = population.shares
    best = int(np.random.default_rng(seed).choice(len(shares), p=shares))
    return Constrained(
        text=texts[best],
        texts=texts,
        tokens=population.tokens,
        weights=shares.tolist(),
        complete=population.complete,
        log_evidence=population.log_evidence,
        checks=int(found[0].stats.extra["checks"]),
    )


def _refuse(made: Awrs, model: Any, config: Any, sample: bool, streamer: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ThriftError for what cannot be generated under a constraint."""
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ThriftError("awrs works with greedy decoding and sampling: leave out num_beams and its likes")
    if made.particles > 1 and not sample:
        raise ThriftError("greedy particles are all the same: set do_sample=True, or particles=1")
    if made.particles > 1 and streamer is not None:
        raise ThriftError("particles cannot be streamed, which one stays is known at the end: set particles=1")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ThriftError(f"awrs cannot return {name}: leave it out")
    if model.config.is_encoder_decoder or model_kwargs.get("past_key_values") is None:
        raise ThriftError("awrs needs a decoder-only model and its key-value cache: leave out use_cache=False")
