"""SkipDecode: the later a token, the fewer layers it runs through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode

from ..core.errors import ThriftError
from ..core.method import method
from ..models.depth import Depth
from .engine import DecodeStats


@method(
    "skip_decode",
    stage="decode",
    paper="SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
    arxiv="2307.02628",
    status="partial",
)
class SkipDecode:
    """**Lossy**: run fewer and fewer of the middle layers from one generated token to the next.

    The t-th of T new tokens is produced by ``n = most - (most - least) t / (T - 1)`` layers, rounded: the first
    ``warmup`` and the last ``n - warmup``; the prompt by ``most``. All rows of a batch skip the same layers. As they
    never come back, every layer that runs finds the keys and values of all tokens before. The cost is known in advance.

    The paper fine-tunes models with this schedule. A model that was not loses quality fast.

    Args:
        most: layers for the prompt and the first new token: a count, or a share of the model's layers.
        least: layers for the last new token, if ``max_new_tokens`` are generated.
        warmup: layers at the bottom that always run.

    Assumed, since the paper's constants and code were not at hand: the defaults, and the rounding. The cache holds
    fewer tokens in layers that were skipped: it cannot be continued from. Analytic FLOPs count all layers.

    Raises:
        ThriftError: a parameter outside its range; when generating, more layers than the model has, a model whose
            layers are not found, a cache left by another call of this kind, beams.
    """

    most: int | float = 1.0
    least: int | float = 0.5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name in ("most", "least"):
            value = getattr(self, name)
            if value <= 0 or (isinstance(value, float) and value > 1):
                raise ThriftError(f"skip_decode needs {name} as a count of layers or a share up to 1.0, not {value!r}")
        if self.warmup < 1:
            raise ThriftError("skip_decode needs warmup of at least 1")

    def schedule(self, layers: int, tokens: int) -> list[int]:
        """The number of layers that produce each of so many new tokens.

        Raises:
            ThriftError: parameters that do not fit a model with so many layers.
        """
        most, least = (n if isinstance(n, int) else max(round(n * layers), 1) for n in (self.most, self.least))
        if not self.warmup <= least <= most <= layers:
            raise ThriftError(
                f"skip_decode needs warmup <= least <= most <= the model's {layers} layers, "
                f"not {self.warmup}, {least}, {most}"
            )
        return [int(most - (most - least) * t / max(tokens - 1, 1) + 0.5) for t in range(tokens)]

    def active(self, n: int, layers: int) -> list[int]:
        """Which layers run when n do."""
        return [*range(self.warmup), *range(layers - n + self.warmup, layers)]

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
        on_done: Callable[[DecodeStats], None] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, as a ``custom_generate`` of transformers' ``generate``: its own, with layers left out."""
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if generation_config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ThriftError("skip_decode works with greedy decoding and sampling: leave out num_beams and its likes")
        if cache is None or not model_kwargs.get("use_cache", True):
            raise ThriftError("skip_decode needs a key-value cache: leave out use_cache=False")
        depth = Depth(model)
        layers, prompt = len(depth.layers), (input_ids if mask is None or mask.dim() != 2 else mask).shape[1]
        counts = self.schedule(layers, max(generation_config.max_length - input_ids.shape[1], 1))
        self._check(cache, self.active(counts[0], layers), self.active(counts[-1], layers))
        stats, left_out = DecodeStats(), ExitStack()
        run = whole = 0

        def before(*_: Any) -> None:
            nonlocal run, whole
            t = max(cache.get_seq_length() - prompt + 1, 0)  # of the token that this forward produces
            n = counts[min(t, len(counts) - 1)]
            run, whole = run + n, whole + layers
            stats.forwards += 1
            left_out.enter_context(depth.running(self.active(n, layers)))

        began = perf_counter()
        with left_out, ExitStack() as hooks:
            hooks.callback(model.register_forward_pre_hook(before).remove)
            hooks.callback(model.register_forward_hook(lambda *_: left_out.close(), always_call=True).remove)
            out = model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        if on_done is not None:
            stats.committed = getattr(out, "sequences", out).shape[1] - input_ids.shape[1]
            stats.verify_seconds = perf_counter() - began
            stats.extra = {"layers": run, "layers_of_all": whole}
            on_done(stats)
        return out

    def _check(self, cache: Any, first: list[int], last: list[int]) -> None:
        """Raise ThriftError for a cache whose masks would be those of a layer that is skipped."""
        held = [cache.layers[i].get_seq_length() for i in first if i < len(cache.layers)]
        if len(set(held)) > 1:
            raise ThriftError("this cache lacks tokens in layers that were skipped: begin with a new one")
        sliding = list(cache.is_sliding)
        for kind in set(sliding):
            if (needed := sliding.index(kind)) not in last:
                raise ThriftError(
                    f"this model has two kinds of attention: skip_decode needs warmup={needed + 1} or more"
                )
