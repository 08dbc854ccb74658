"""Measuring one plan on one case of a language model: what it changes in the distributions, and what it saves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..api import apply
from ..core.costs import DecoderCosts
from ..core.plan import Plan
from ..core.session import Session
from . import metrics
from .tasks import Case, Probe


@dataclass
class Reference:
    """What the unmodified model says on a case; plans are compared with it."""

    case: str
    continuation: list[int]
    logits: Tensor | None


class LanguageBench:
    """Measures plans on a causal language model. Nothing is kept between cases but the last :class:`Reference`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.costs = DecoderCosts.of(model)
        self._reference: Reference | None = None

    # ---- quality ----------------------------------------------------------------------------------------------------

    def quality(self, plan: Plan, case: Case) -> dict[str, Any]:
        """Fidelity and task scores of a plan; the same forwards give tokens, KV bytes and time to the first token."""
        reference = self._reference
        if reference is None or reference.case != case.id:
            reference = self._reference = Reference(case.id, self._continuation(case), None)
        if reference.continuation and reference.logits is None and plan:  # a resumed run begins in the middle of a case
            reference.logits = self._measure(Plan(), case, reference, probes=False)["logits"]
        row = self._measure(plan, case, reference)
        if not plan and reference.logits is None:
            reference.logits = row.get("logits")
        return {k: v for k, v in row.items() if k != "logits"}

    def _continuation(self, case: Case) -> list[int]:
        """The held-back text; for a user's prompt, what the unmodified model itself writes next."""
        if case.expected:
            return self._ids(case.probes[0].answer)
        if case.kind != "prompt":
            return self._ids(case.continuation)
        prompt = self._encode(case, case.context)
        inputs = self._tensor(prompt)
        with torch.no_grad():
            out = self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=case.new_tokens, do_sample=False
            )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def _measure(self, plan: Plan, case: Case, reference: Reference, probes: bool = True) -> dict[str, Any]:
        with apply(plan, self.model, processor=self.tokenizer) as session:
            start = self._now()
            prompt, compressed = self._shorten(session, plan, case)
            compressed_at = self._now()
            out = self.model(self._tensor(prompt), use_cache=True, logits_to_keep=1)
            first_at = self._now()
            cache, first = out.past_key_values, out.logits[0, -1:]
            row: dict[str, Any] = {
                "tokens_before": len(self._encode(case, case.context)),
                "tokens": len(prompt),
                "compress_s": compressed_at - start,
                "ttft_s": first_at - start,
                "kv_bytes": cache_bytes(cache),
            }
            if case.expected:
                recall, logits = self._recall(cache, first, case, probes)
                row |= {**recall, "seconds": row["ttft_s"] + recall["answer_s"]}
                row |= {**self._fidelity(case, reference, logits), "logits": logits}
            elif probes:
                row["scores"] = [[p.task, self._score(cache, first, p)] for p in case.probes]
            if compressed is not None:
                row["kept"] = [list(map(int, span)) for span in compressed.kept]
            if reference.continuation and not case.expected:
                logits = self._follow(cache, first, reference.continuation)
                row |= self._fidelity(case, reference, logits)
                row["logits"] = logits
        return row

    def _fidelity(self, case: Case, reference: Reference, logits: Tensor) -> dict[str, Any]:
        full = logits if reference.logits is None else reference.logits
        tokens = torch.tensor(reference.continuation, device=logits.device)
        found: dict[str, Any] = {
            "kl": metrics.kl_divergence(full, logits),
            "agreement": metrics.top1_agreement(full, logits),
            "positions": len(tokens),
        }
        if case.continuation:  # a true text, so how well it is predicted is a score
            found["nats"] = metrics.nats_per_token(logits, tokens)
            found["continuation"] = metrics.hits(logits, tokens)
        return found

    def _recall(self, cache: Any, first: Tensor, case: Case, write: bool) -> tuple[dict[str, Any], Tensor]:
        """The answer by teacher forcing and, with ``write``, by free greedy decoding; and the former's logits.

        Both take one token at a time, as decoding does, so that plans which act while decoding act here too.
        """
        [probe] = case.probes
        if probe.lead:
            lead = self._ids(probe.lead)
            first = self.model(self._tensor(lead), past_key_values=cache, logits_to_keep=1).logits[0, -1:]
        answer, followed = self._ids(probe.answer), [first]
        spare = copy.deepcopy(cache) if write else cache
        start = self._now()
        for token in answer[:-1]:
            followed.append(self.model(self._tensor([token]), past_key_values=spare).logits[0, -1:])
        seconds = self._now() - start
        logits, tokens = torch.cat(followed), torch.tensor(answer, device=first.device)
        row: dict[str, Any] = {
            "answer_s": seconds,
            "decode_ms": 1e3 * seconds / max(len(answer) - 1, 1),
            "hits": metrics.hits(logits, tokens),
            "probability": metrics.probability(logits, tokens),
        }
        if write:
            row["text"] = probe.answer if row["hits"] == 1 else self._write(cache, first, case)
            row["recall"] = metrics.recall(row["text"], case.expected)
            row["scores"] = [[probe.task, row[case.score]]]
        return row, logits

    def _write(self, cache: Any, first: Tensor, case: Case) -> str:
        """What greedy decoding writes; no more of it than finds all that is expected."""
        written: list[int] = []
        text, logits = "", first
        while len(written) < case.new_tokens and metrics.recall(text, case.expected) < 1:
            token = int(logits.argmax())
            if token in self._stops:
                break
            written.append(token)
            text = self.tokenizer.decode(written)
            logits = self.model(self._tensor([token]), past_key_values=cache).logits[0, -1:]
        return text

    def _score(self, cache: Any, first: Tensor, probe: Probe) -> float:
        lead, answer = self._ids(probe.lead), self._ids(probe.answer)
        logits = self._follow(copy.deepcopy(cache), first, lead + answer)[len(lead) :]
        return metrics.hits(logits, torch.tensor(answer, device=logits.device))

    def _follow(self, cache: Any, first: Tensor, tokens: list[int]) -> Tensor:
        """Logits that predict each of ``tokens`` after the (reduced) cache; ``first`` predicts the first of them."""
        if len(tokens) == 1:
            return first
        return torch.cat([first, self.model(self._tensor(tokens[:-1]), past_key_values=cache).logits[0]])

    # ---- speed ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def speed(self, plan: Plan, case: Case, check: bool = False) -> dict[str, Any]:
        """Time of the user's own call, ``model.generate``, which writes exactly ``new_tokens`` tokens greedily.

        ``check`` adds ``exact`` for plans with a decode stage: the share of generated tokens that plain greedy
        decoding (with the rest of the plan) finds most likely too; ties in float arithmetic count as found.
        """
        with apply(plan, self.model, processor=self.tokenizer) as session:
            clock = Clock(self._now)
            start = self._now()
            prompt, _ = self._shorten(session, plan, case)
            compressed_at = self._now()
            scoring = session.flops  # the text stage's own forwards are in its seconds
            inputs = self._tensor(prompt)
            out = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=case.new_tokens,
                do_sample=False,
                eos_token_id=self._never,  # equal lengths, so that times can be compared
                pad_token_id=0,
                streamer=clock,
                return_dict_in_generate=True,
            )
            end = self._now()
        new = out.sequences[0, len(prompt) :].tolist()
        first_at = clock.first or end
        row = {
            "tokens": len(prompt),
            "new_tokens": len(new),
            "seconds": end - start,
            "compress_s": compressed_at - start,
            "ttft_s": first_at - start,
            "decode_ms": 1e3 * (end - first_at) / max(len(new) - 1, 1),
            "generated": new,
            "flops": self._flops(session, len(prompt), len(new)) - scoring,
        }
        if getattr(out, "past_key_values", None) is not None:
            row["kv_bytes_end"] = cache_bytes(out.past_key_values)
        if check and "decode" in plan.stages:
            row["exact"] = self._exact(plan, case, new)
        return row

    def _exact(self, plan: Plan, case: Case, new: list[int]) -> float:
        with apply(without_decode(plan), self.model, processor=self.tokenizer) as session:
            prompt, _ = self._shorten(session, plan, case)
            out = self.model(self._tensor(prompt), use_cache=True, logits_to_keep=1)
            logits = self._follow(out.past_key_values, out.logits[0, -1:], new).to(torch.float32)
        chosen = logits.gather(-1, torch.tensor(new, device=logits.device)[:, None])[:, 0]
        return float((chosen >= logits.max(-1).values - 1e-2).to(torch.float32).mean())

    # ---- helpers ----------------------------------------------------------------------------------------------------

    @property
    def _never(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def _stops(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    def _shorten(self, session: Session, plan: Plan, case: Case) -> tuple[list[int], Any]:
        """The prompt's tokens, after the plan's text stage if it has one, and what that stage returned."""
        if "text" not in plan.stages:
            return self._encode(case, case.context), None
        compressed = session.compress(case.context, case.question.strip() or None)
        return self._encode(case, compressed.text), compressed

    def _encode(self, case: Case, context: str) -> list[int]:
        if case.chat:
            message = [{"role": "user", "content": context + case.question}]
            encoded = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        ids = self.tokenizer(context, verbose=False)["input_ids"]
        return list(ids) + self._ids(case.question)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return perf_counter()

    def _flops(self, session: Session, prompt: int, new: int) -> float:
        """From the session if its runtimes counted; else analytic, since a plan without hooks runs plain forwards."""
        if session.forwards:
            return session.flops
        steps = sum(self.costs.flops(1, prompt + i) for i in range(1, new))
        return float(self.costs.flops(prompt, prompt, logits=1) + steps)


class Clock:
    """A streamer that notes when the first new token arrives."""

    def __init__(self, now: Any) -> None:
        self.now, self.first, self._prompt_seen = now, None, False

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.first is None:
            self.first = self.now()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache really holds."""
    layers = getattr(cache, "layers", None) or []
    tensors = (t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)))
    return sum(t.nbytes for t in tensors if t is not None)


def without_decode(plan: Plan) -> Plan:
    """The part of a plan that decides what the model says; the decode stage only decides how fast it says it."""
    return Plan(steps=[step for step in plan if step.stage != "decode"])
