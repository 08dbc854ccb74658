"""LlamaIndex: retrieved nodes shortened to what a question needs.

index.as_query_engine(node_postprocessors=[TokenthriftPostprocessor(method="embedding_sentences", rate=0.4)])
"""

from __future__ import annotations

from typing import Any

from ..core.method import find

try:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from pydantic import Field
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "tokenthrift.integrations.llamaindex needs llama-index-core: pip install 'tokenthrift[llamaindex]'"
    ) from None


class TokenthriftPostprocessor(BaseNodePostprocessor):
    """Shortens each text node by a text method, with the query as its question; ids, scores and order stay.

    What came of a node is in its metadata under ``tokenthrift``, which neither the language model nor an embedding gets
    to see: the spans of the original that were kept, and the tokens before and after. The nodes given, which an index
    may hold, are not changed; those without text come back as they are.

    Attributes:
        method: a text method; see ``tokenthrift methods --stage text``.
        rate: share of each node's tokens to keep, or a number of tokens.
        options: more arguments of ``tokenthrift.compress``: a tokenizer, a scorer, parameters of the method.
    """

    method: str = "embedding_sentences"
    rate: float | int = 0.5
    options: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        find(self.method, "text").make(rate=self.rate)  # mistakes are told before there are nodes

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex calls it."""
        return "TokenthriftPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        question = None if query_bundle is None else query_bundle.query_str
        return [self._shorter(node, question) for node in nodes]

    def _shorter(self, scored: NodeWithScore, question: str | None) -> NodeWithScore:
        from ..api import compress

        node = scored.node
        if not isinstance(node, TextNode) or not node.text.strip():
            return scored
        out = compress(node.text, self.method, rate=self.rate, question=question, **self.options)
        told = {"kept": out.kept, "tokens_before": out.tokens_before, "tokens_after": out.tokens_after}
        changes = {
            "text": out.text,
            "metadata": {**node.metadata, "tokenthrift": told},
            "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, "tokenthrift"],
            "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, "tokenthrift"],
        }
        return NodeWithScore(node=node.model_copy(update=changes), score=scored.score)
