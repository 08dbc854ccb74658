"""View: what a method may look at, each part computed only when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ThriftError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """A grid of visual tokens: a whole image (or its thumbnail), one crop of it, or the frames of a video.

    Attributes:
        start: number of its first token; the others follow in raster order, frame by frame.
        t, h, w: frames, rows and columns of tokens.
        kind: ``"image"``, ``"crop"`` or ``"frame"``.
        row, col: where a crop lies among the crops of its image.
        index: ``(t·h·w,)`` int64, the numbers of the tokens where they do not follow each other.
    """

    start: int
    t: int
    h: int
    w: int
    kind: str = "image"
    row: int = 0
    col: int = 0
    index: Tensor | None = None

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return self.t * self.h * self.w

    def numbers(self, device: torch.device | str = "cpu") -> Tensor:
        """``(t·h·w,)`` int64: the numbers of its tokens, in raster order."""
        import torch  # a plan that is only read needs none

        if self.index is not None:
            return self.index.to(device)
        return torch.arange(self.start, self.start + self.size, device=device)


class View:
    """A bag of named parts. A part is a value, or a function of no arguments that is called once, on first use.

    Runtimes (adapters) make views; methods read them. The parts that exist, by stage:

    ================ ================================== ==========================================================
    part             stages                             meaning
    ================ ================================== ==========================================================
    ``features``     vision connector prefill           hidden states, ``(batch, tokens, dim)``; of a connector the
                                                        visual tokens that the language model gets, a row an image
    ``keys``         vision cache prefill attention     ``(batch, kv_heads, tokens, head_dim)``, after RoPE in caches
    ``values``       cache attention                    ``(batch, kv_heads, tokens, head_dim)``
    ``queries``      cache prefill attention            ``(batch, heads, tokens, head_dim)`` of the same forward: one
                                                        token at the attention stage
    ``attention``    vision cache prefill               function ``rows -> (batch, heads, rows, tokens)``: softmax
                                                        attention of the last (cache, prefill) or given (vision)
                                                        query rows
    ``ahead``        cache                              how many tokens behind the prompt only ask: the last rows of
                                                        ``attention``, whose columns include them
    ``draft``        prefill                            function ``(rows, steps, first layer, reduce)`` -> what
                                                        ``reduce`` makes of a draft model's attention, by step and layer
    ``received``     cache                              ``(batch, kv_heads, tokens)``, attention from all queries so
                                                        far, mean over the query heads that share a head
    ``asked``        cache                              ``(batch, kv_heads, tokens)``, how many queries those were
    ``importance``   prefill                            ``(batch, tokens)``, attention received from all queries, summed
                                                        over heads and over the layers so far; ``lengths`` ``(batch,)``
                                                        the real tokens that the prompt had
    ``visual``       prefill                            ``(batch, tokens)`` bool, those that stand for images;
                                                        ``visual_lengths`` ``(batch,)`` how many the prompt had
    ``again``        cache                              whether what an earlier call kept is reduced once more; the
                                                        tokens are then cache entries, there are no ``positions``, and
                                                        ``queries`` and ``rotary`` are those of the last tokens, as many
                                                        as the method's ``lookback`` says
    ``seen``         cache                              ``(batch,)``, real tokens that came so far, kept or not
    ``by_head``      cache                              where it is ``again``: a view of the same entries in which each
                                                        key/value head is a row of its own, with its own ``mask``
    ``scaling``      cache attention                    factor on ``q·k`` in the layer's attention
    ``rotary``       cache                              :class:`~tokenthrift.ops.rotary.Rotary`: how the layer rotated
                                                        its queries and keys by their positions
    ``mask``         all                                ``(batch, tokens)`` bool, true = real, false = padding; None at
                                                        the attention stage where nothing is padding
    ``protected``    all                                ``(batch, tokens)`` bool, tokens that must survive
    ``positions``    all                                ``(batch, tokens)`` int64
    ``sizes``        vision cache                       ``(batch, tokens)``, original tokens in each token; of
                                                        ``(batch, kv_heads, tokens)`` entries where it is ``again``
    ``grid``         vision connector                   ``(t, h, w)`` of the patch tokens, before any reduction
    ``prefix``       vision                             number of leading tokens that are no patches (CLS, registers)
    ``tokens``       vision                             tokens at the start of the forward, the prefix included
    ``segments``     vision                             ``(batch, tokens)`` int64, of texts: the number of the
                                                        identifier that a token belongs to
    ``segments``     connector                          tuple of :class:`Segment`: how the tokens of an image lie
    ``cls``          connector                          function ``layer -> (batch, heads, tokens)``: attention of the
                                                        encoder's CLS token, softmax over all of the encoder's tokens
    ``received``     connector                          function ``layer -> (batch, tokens)``: attention received from
                                                        all of the encoder's queries, mean over these and over heads
    ``keys``         connector                          function ``layer -> (batch, heads, tokens, head_dim)``: the
                                                        encoder's keys, as its attention gets them
    ``hidden``       connector                          function ``layer -> (batch, tokens, width)``: hidden states
                                                        after a layer of the encoder
    ``text``         connector                          ``(batch, text tokens, dim)``: embeddings of the text around;
                                                        ``text_mask`` ``(batch, text tokens)`` bool
    ``layer``        vision cache prefill attention     index of the layer; ``layers`` their number. At the attention
                                                        stage layers with a sliding window are not counted; at the
                                                        connector stage ``layers`` are those of the encoder
    ``memory``       attention                          dict, what the method remembers of this layer and cache
    ``shared``       attention                          dict, the same for all layers of the cache
    ``text``         text                               the prompt; ``question`` what will be asked, or None
    ``protected_spans`` text                            ``(start, end, kind)`` of what must survive in the text;
                                                        ``best_within`` keeps it without being told
    ``scorer``       text                               a causal language model for self-information
    ``embedder``     text                               a sentence embedder
    ``tokenizer``    text                               the user's tokenizer, which defines what a token is
    ================ ================================== ==========================================================
    """

    def __init__(self, **parts: Any) -> None:
        # Not by offer(): at the attention stage a view is made for every layer and token.
        self._makers = {name: part.make for name, part in parts.items() if isinstance(part, Lazy)}
        self._parts = {name: part for name, part in parts.items() if not isinstance(part, Lazy)}

    def offer(self, name: str, part: Any) -> None:
        """Add a ready value, or a :class:`Lazy` part; it takes the place of an earlier part of that name."""
        self._makers.pop(name, None)
        self._parts.pop(name, None)
        if isinstance(part, Lazy):
            self._makers[name] = part.make
        else:
            self._parts[name] = part

    def require(self, needs: Iterable[str]) -> View:
        """Check that every part in ``needs`` exists (in this stage); returns the view itself."""
        missing = [n for n in needs if n not in self]
        if missing:
            raise ThriftError(
                f"this stage cannot offer {', '.join(map(repr, missing))}; it has: {', '.join(sorted(self))}"
            )
        return self

    def forget(self) -> None:
        """Let go of all parts, as what makes them often holds the view itself: without this their memory would stay
        until the garbage collector comes by."""
        parts = list(self._parts.values())
        self._makers.clear()
        self._parts.clear()
        for part in parts:
            if isinstance(part, View):
                part.forget()

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._makers

    def __iter__(self) -> Any:
        return iter({**self._parts, **self._makers})

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not real attributes.
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._parts:
            if name not in self._makers:
                raise AttributeError(f"the view has no part {name!r}; it has: {', '.join(sorted(self))}")
            self._parts[name] = self._makers[name]()
        return self._parts[name]

    def computed(self) -> set[str]:
        """Names of the parts that exist as values by now (for tests that nothing else was computed)."""
        return set(self._parts)


class Lazy:
    """Marks a function as a part to be computed on first use: ``View(keys=Lazy(lambda: project(x)))``."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
