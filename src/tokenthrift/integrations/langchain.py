"""LangChain: documents shortened to what a question needs.

    compressor = TokenthriftCompressor(method="embedding_sentences", rate=0.4)
    ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)

As a step of a chain: ``RunnableLambda(lambda found: compressor.compress_documents(found["docs"], found["query"]))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.method import find

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import Field
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "tokenthrift.integrations.langchain needs langchain-core: pip install 'tokenthrift[langchain]'"
    ) from None


class TokenthriftCompressor(BaseDocumentCompressor):
    """Shortens each document by a text method, with the query as its question; order and number stay.

    What came of a document is in its metadata under ``tokenthrift``: the spans of the original that were kept, and the
    tokens before and after. The documents given are not changed; those without text come back as they are.

    Attributes:
        method: a text method; see ``tokenthrift methods --stage text``.
        rate: share of each document's tokens to keep, or a number of tokens.
        options: more arguments of ``tokenthrift.compress``: a tokenizer, a scorer, parameters of the method.
    """

    method: str = "embedding_sentences"
    rate: float | int = 0.5
    options: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        find(self.method, "text").make(rate=self.rate)  # mistakes are told before there are documents

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The same documents, shorter."""
        return [self._shorter(document, query) for document in documents]

    def _shorter(self, document: Document, query: str) -> Document:
        from ..api import compress

        text = document.page_content
        if not text.strip():
            return document
        out = compress(text, self.method, rate=self.rate, question=query, **self.options)
        told = {"kept": out.kept, "tokens_before": out.tokens_before, "tokens_after": out.tokens_after}
        metadata = {**document.metadata, "tokenthrift": told}
        return document.model_copy(update={"page_content": out.text, "metadata": metadata})
