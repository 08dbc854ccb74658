"""EXIT: ask a language model of every sentence, in its context, whether it helps to answer the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.tokenmap import TokenMap
from ..core.view import View
from ..models.adapted import load_adapted
from ..models.branches import branch_logits
from ..models.decoder import context_length
from ..models.pairs import Pair, as_pair, open_pair
from ..models.scoring import document_start
from ..ops.tokens import Span, encode
from .asking import best_of_first, question_of
from .passages import passages
from .selection import keeps_all
from .spans import join, sentences, spans_to_map

ASK = 'Is this sentence useful in answering the query? Answer only "Yes" or "No".'
_BODY = "\ue000"  # stands for what the user says while the chat template is laid around it


@method(
    "exit",
    stage="text",
    paper="EXIT: Context-Aware Extractive Compression for Enhancing Retrieval-Augmented Generation",
    arxiv="2412.12559",
    needs=("text", "question", "tokenizer"),
    status="partial",
)
class Exit:
    """Keeps the sentences of which a language model most probably says that they help to answer the question.

    The model sees the question, the passage that the sentence is in, and the sentence; the score is the probability of
    "Yes" among "Yes" and "No". Probabilities equal those of the authors' code with the same model. Question and passage
    are read once for all sentences, which the authors' code does not do. Any causal language model will do, but the
    paper's is trained for it: ``adapter="doubleyyh/exit-gemma-2b"``; others answer as they are. Assumed: sentences are
    split by rules (``text.spans.sentences``) and keep the white space between them; the prompt is laid out by the
    model's own chat template (which is the paper's for Gemma), or plainly, ending in "Answer:"; a longer text is read
    in passages of whole sentences; at least one sentence is kept, where the paper may keep none.

    Attributes:
        rate: share of the tokens to keep, in (0, 1]; an int is a number of tokens.
        threshold: sentences with a lower probability are dropped even if they fit; ``rate=1.0, threshold=0.5`` is the
            paper's rule. None = the rate alone decides.
        model: a pack, folder or hub id of a causal LM, or (model, tokenizer); None = the scorer that is there, the
            smollm2-135m pack by default, or the model that the adapter names.
        adapter: folder or hub id of a LoRA adapter for it (needs ``pip install 'tokenthrift[adapters]'``).
        context: tokens of the text that are read together, at most.

    Raises:
        ThriftError: parameters outside these ranges; when a text comes: no question, or one that is longer than the
            model's context, or a model that cannot be loaded or does not generate.
    """

    rate: float = 0.5
    threshold: float | None = None
    model: Any = None
    adapter: str | None = None
    context: int = 1024

    def __post_init__(self) -> None:
        Budget.of(self.rate)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ThriftError(f"exit(threshold={self.threshold}) is no probability: give one from 0 to 1, or None")
        if self.context < 1:
            raise ThriftError(f"exit(context={self.context}) reads nothing: give a number of tokens, 1024 for instance")
        object.__setattr__(self, "model", as_pair("exit", self.model))
        if self.adapter is not None and isinstance(self.model, Pair):
            raise ThriftError("exit merges an adapter into a model that it loads itself: give model as a name, or None")

    @property
    def limited(self) -> bool:
        """Whether something beside the rate may drop sentences."""
        return self.threshold is not None

    def prepare(self, view: View) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        question_of(view, "exit")
        if self.adapter is not None:
            return load_adapted(self.adapter, self.model)
        return (view.scorer.model, view.scorer.tokenizer) if self.model is None else open_pair(self.model)

    def reduce(self, view: View) -> TokenMap:
        text, question = view.text, question_of(view, "exit")
        units = sentences(text)
        if keeps_all(text, units, self.rate, view.tokenizer) and self.threshold is None:
            return spans_to_map(units, len(text))
        model, tokenizer = self.prepare(view)
        progress = getattr(view.scorer, "progress", None) if self.model is None and self.adapter is None else None
        scores = usefulness(text, units, question, model, tokenizer, self.context, progress)
        good = None if self.threshold is None else sum(score >= self.threshold for score in scores)
        return spans_to_map(best_of_first(text, units, scores, self.rate, view.tokenizer, good), len(text))


def usefulness(
    text: str,
    units: Sequence[Span],
    question: str,
    model: Any,
    tokenizer: Any,
    context: int = 1024,
    progress: Any = None,
) -> list[float]:
    """Of each unit, the probability of "Yes" among "Yes" and "No" when the model is asked whether it is useful."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ThriftError(f"exit asks a causal language model; {type(model).__name__} gives no token probabilities")
    before, after, answers = _layout(tokenizer)
    head = _ids(tokenizer, f"{before}Query:\n{question}\nFull context:\n")
    tails = [_ids(tokenizer, f"\nSentence:\n{join(text, [unit]).strip()}\n{ASK}{after}") for unit in units]
    room = (context_length(model) or 1 << 30) - len(head) - max(map(len, tails))
    if room < 1:
        raise ThriftError(
            f"the question and a sentence have {len(head) + max(map(len, tails)):,} tokens with the instruction, the "
            f"model's context is {context_length(model):,}: shorten the question or choose another model"
        )
    pick = [_ids(tokenizer, answer)[0] for answer in answers]
    if pick[0] == pick[1]:
        raise ThriftError(f"exit cannot tell the answers of {type(model).__name__} apart: Yes and No begin alike")

    scores: list[float] = []
    limit = min(context, room)
    for passage in passages(text, units, tokenizer, limit):
        told = (lambda done, _, start=passage.start: progress(start + done, len(units))) if progress else None
        shown = _ids(tokenizer, join(text, [units[i] for i in passage]).strip())
        if len(shown) > limit:  # one sentence, or tokens that joining has changed: the ends stay, as with the authors
            shown = [*shown[: (limit + 1) // 2], *shown[len(shown) - limit // 2 :]]
        logits = branch_logits(model, [*head, *shown], [tails[i] for i in passage], pick, told)
        scores += logits.softmax(-1)[:, 0].tolist()
    return scores


def _layout(tokenizer: Any) -> tuple[str, str, tuple[str, str]]:
    """What comes before and after the user's words, and how the two answers are written after that."""
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": _BODY}]
        before, _, after = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True).partition(
            _BODY
        )
        return before, after, ("Yes", "No")
    start = document_start(tokenizer)
    return "" if start is None else tokenizer.convert_ids_to_tokens(start), "\nAnswer:", (" Yes", " No")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return encode(tokenizer, [text])[0][0]
