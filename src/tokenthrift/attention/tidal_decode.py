"""TidalDecode: neighbouring layers read the same entries, so few layers have to choose them."""

from __future__ import annotations

from torch import Tensor

from ..core.budget import Budget
from ..core.errors import ThriftError
from ..core.method import method
from ..core.view import View
from ..ops.attention import attention_rows, group_mean
from ..ops.topk import top_entries


@method(
    "tidal_decode",
    stage="attention",
    paper="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    arxiv="2410.05076",
    needs=("queries", "keys", "scaling", "mask", "layer", "layers", "shared"),
)
class TidalDecode:
    """Let two layers read everything and choose the entries that the layers after them read.

    The first layers are dense. The layer after them, and one in the middle, attend to all entries and note those with
    the largest products with the query; all other layers read what was noted last.

    Args:
        budget: entries to read per head in layers that do not read everything.
        dense: how many of the first layers neither choose nor are chosen for.
        reselect: index of the layer that chooses again, layers with a sliding window not counted. None: at 13/32 of
            the depth, the authors' choice for models of 32 layers.
        heads: ``"group"``: the query heads that share a key/value head choose together, by their mean attention,
            ``"query"``: each chooses for itself, as in the authors' code.
    """

    budget: int = 512
    dense: int = 2
    reselect: int | None = None
    heads: str = "group"

    def __post_init__(self) -> None:
        Budget.of(self.budget)
        if self.dense < 0:
            raise ThriftError(f"tidal_decode needs dense >= 0, the number of first layers, got {self.dense}")
        if self.reselect is not None and self.reselect <= self.dense:
            raise ThriftError(
                f"tidal_decode needs reselect > dense, the layer that chooses first, got reselect={self.reselect}, "
                f"dense={self.dense}"
            )
        if self.heads not in ("group", "query"):
            raise ThriftError(f"tidal_decode knows heads='group' and heads='query', got '{self.heads}'")

    def select(self, view: View) -> Tensor | None:
        reselect = round(view.layers * 13 / 32) if self.reselect is None else self.reselect
        if self.reselect is not None and reselect >= view.layers:
            raise ThriftError(f"tidal_decode has reselect={reselect}, but only {view.layers} layers can select")
        if view.keys.shape[-2] <= self.budget or view.layer < self.dense:
            return None
        if view.layer in (self.dense, reselect):
            view.shared["chosen"] = self._choose(view)
            return None
        chosen: Tensor = view.shared["chosen"]
        return chosen

    def _choose(self, view: View) -> Tensor:
        rows = attention_rows(view.queries, view.keys, view.scaling, view.mask).squeeze(2)
        if self.heads == "group":
            rows = group_mean(rows, view.keys.shape[1])
        return top_entries(rows, self.budget, view.mask)
