"""The model that the harness knows as ``tokenthrift``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from uuid import uuid4

from ...api import apply
from ...core.errors import ThriftError
from ...core.plan import Plan

try:
    import torch
    from lm_eval.api.model import CacheHook
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"tokenthrift.integrations.lm_eval needs {missing.name}: pip install 'tokenthrift[lm-eval]'"
    ) from None


@register_model("tokenthrift")
class TokenthriftLM(HFLM):
    """The harness's own ``hf`` model with a plan: with an empty one, results are those of ``--model hf``, bit for bit.

    What a request's context is to the model, a prompt, the plan reduces; the continuation is scored, or written, after
    it, token by token, as in decoding.

    - ``loglikelihood``: with stages that act inside the model, the prompt's forward reduces, and each token of the
      continuation is a decoding step. A decode stage only decides how fast tokens are found, so it is left out;
      one that decodes by a rule of its own (``skip_decode``, ``awrs``) is refused.
    - ``generate_until``: the harness's own call of ``generate``, with the whole plan.
    - ``loglikelihood_rolling`` has no prompt. It is read token by token by plans that act while decoding (the
      attention stage; cache methods with ``every``); others would not act, and are refused.
    - The text stage shortens contexts before they are tokenised, by the model itself where a method needs one. What
      follows the last ``question_from`` of a context, and the continuation, are left alone; the former is the question
      for methods that look at one. A context without it is shortened as a whole. With a chat template, messages are
      shortened before it is applied: the text before the question in the last user's message, and all messages
      between a system prompt and this one.

    What was reduced is among the results, in ``config``, as ``tokenthrift``: by kind of request, then by stage.

    Args:
        pretrained: a model pack, folder or hub id, or a model. Weights are read from safetensors, unless
            ``use_safetensors=False`` says otherwise.
        plan: whatever ``tokenthrift.apply`` takes. On a command line plans with commas need no quotes but the shell's.
        question_from: where the question begins; by default after a blank line, which separates the harness's
            examples. ``\\n`` may be written for a line break.
        settings: everything else that ``hf`` takes.

    Raises:
        ThriftError: no such plan, or one that does not fit the model or a kind of request.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: Plan | str | Mapping[str, Any] | None = None,
        question_from: str = "\n\n",
        **settings: Any,
    ) -> None:
        self.plan = Plan.of(plan)  # mistakes are told before a model is loaded
        self.question_from = str(question_from).replace("\\n", "\n")
        if not self.question_from:
            raise ThriftError("question_from is empty: give the text with which questions begin, such as 'Question:'")
        if isinstance(pretrained, str):
            from ...models.packs.loading import folder_of
            from ...models.packs.spec import PACKS

            pretrained = str(folder_of(pretrained)) if pretrained in PACKS else pretrained
            if not {"gguf_file", "autogptq", "gptqmodel"} & settings.keys():
                settings.setdefault("use_safetensors", True)
        super().__init__(pretrained, **settings)
        steps = list(self.plan)
        parts = {
            "text": Plan(steps=[step for step in steps if step.stage == "text"]),
            "loglikelihood": Plan(steps=[step for step in steps if step.stage not in ("text", "decode")]),
            "generate_until": Plan(steps=[step for step in steps if step.stage != "text"]),
        }
        # A stage that the model has not is told now. An empty plan asks nothing of the model.
        self._sessions = {kind: apply(part, self.model, self.tokenizer) for kind, part in parts.items() if part}
        self._short: dict[tuple[str, str], str] = {}
        self._templated = False

    # ---- requests ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        return self._answer(super().loglikelihood, requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context."""
        return self._answer(super().generate_until, requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text."""
        for step in self.plan:
            every = getattr(step.method, "every", None)
            if step.stage not in ("attention", "decode") and not (step.stage == "cache" and every):
                more = ", or give it every=..." if every is not None else ""
                raise ThriftError(
                    f"loglikelihood_rolling scores whole texts without a prompt, so {step} would never act: "
                    f"leave out the task{more}"
                )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _answer(self, run: Any, requests: list[Any], **settings: Any) -> Any:
        if "text" not in self._sessions or self._templated:
            return run(requests, **settings)
        shorter = []
        for request in tqdm(requests, desc="Shortening contexts", disable=settings["disable_tqdm"]):
            shorter.append(copy.copy(request))
            shorter[-1].arguments = (self._shorten(request.args[0]), *request.args[1:])
        # What is remembered as the answer to a shorter text would be no answer to a request with this very text.
        hook = self.cache_hook
        self.set_cache_hook(CacheHook(None))
        try:
            return run(shorter, **settings)
        finally:
            self.set_cache_hook(hook)

    # ---- the model --------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for method in self.plan.at("decode"):
            if hasattr(method, "decode"):
                raise ThriftError(
                    f"decode={method.info.name} changes what is written and has no log-likelihoods: "
                    "take tasks of the kind generate_until"
                )
        if "loglikelihood" not in self._sessions:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        from ...models.following import follow

        # One row answers all requests that differ in their last token only, as the options of many tasks do.
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ThriftError(f"a continuation has {len(continuation)} tokens, the model takes {self.max_length}")
            rows.setdefault((tuple(context[-room:]), tuple(continuation[:-1])), []).append(i)
        longest = sorted(rows, key=lambda row: -len(row[0]) - len(row[1]))
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size))
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), desc="Scoring continuations", disable=disable_tqdm or self.rank != 0)
        with self._sessions["loglikelihood"], bar:
            for start in range(0, len(longest), size):
                batch = longest[start : start + size]
                ends = [requests[rows[row][0]][2] for row in batch]
                for row, logits in zip(batch, follow(self.model, [row[0] for row in batch], ends), strict=True):
                    logs, greedy = logits.log_softmax(-1), logits.argmax(-1)
                    for i in rows[row]:
                        tokens = torch.tensor(requests[i][2], device=logs.device)
                        found = logs.gather(-1, tokens[:, None]).sum()
                        answers[i] = float(found), bool((greedy == tokens).all())
                        if requests[i][0] is not None:  # windows of rolling requests are no requests of their own
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                        bar.update()
        return [answers[i] for i in range(len(requests))]

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._sessions.get("generate_until", nullcontext()):
            return super()._model_generate(*args, **kwargs)

    # ---- the text stage ---------------------------------------------------------------------------------------------

    def _shorten(self, context: str, question: str = "") -> str:
        """A context with the text before its question shortened; all of it if the question is given."""
        if (context, question) not in self._short:
            at = -1 if question else context.rfind(self.question_from)
            head, tail = (context, "") if at < 0 else (context[:at], context[at:])
            asked = (question or tail).strip()
            for method in self.plan.at("text"):
                if "question" in method.info.needs and not asked:
                    raise ThriftError(
                        f"text={method.info.name} needs a question, and a context has no {self.question_from!r} where "
                        "one begins: set question_from, e.g. question_from=Question:"
                    )
            if head.strip():
                head = self._sessions["text"].compress(head, asked or None).text
            self._short[context, question] = head + tail
        return self._short[context, question]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text, shortened before if the plan has a text stage."""
        users = [i for i, message in enumerate(chat_history) if message["role"] == "user"]
        if "text" in self._sessions and users:
            self._templated = True
            last = users[-1]
            asked = chat_history[last]["content"].rpartition(self.question_from)[2]
            chat_history = [dict(message) for message in chat_history]
            for i, message in enumerate(chat_history[: last + 1]):
                if message["role"] != "system":
                    message["content"] = self._shorten(message["content"], "" if i == last else asked)
        return super().apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests, in which shortened messages would meet other plans."""
        name = super().tokenizer_name
        return f"{name}-{uuid4().hex}" if "text" in self._sessions else name

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to its results, and what the plan did."""
        done = {kind: session.report().to_dict()["stages"] for kind, session in self._sessions.items()}
        return {**super().get_model_info(), "plan": str(self.plan), "tokenthrift": done}
