"""LangChain's and LlamaIndex' own classes with ours in them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from tokenthrift.core.errors import ThriftError

from ..text.tiny import PROSE, tokenizer

TRUNCATE: dict[str, Any] = {"method": "truncate", "rate": 0.4, "options": {"tokenizer": tokenizer()}}


@pytest.fixture
def langchain() -> Any:
    pytest.importorskip("langchain_core", reason="needs the extra: langchain")
    from tokenthrift.integrations import langchain

    return langchain


@pytest.fixture
def llamaindex() -> Any:
    pytest.importorskip("llama_index.core", reason="needs the extra: llamaindex")
    from tokenthrift.integrations import llamaindex

    return llamaindex


def check(text: str, told: dict[str, Any]) -> None:
    assert text == "".join(PROSE[a:b] for a, b in told["kept"])
    assert 0 < told["tokens_after"] <= 0.4 * told["tokens_before"]


def test_langchain_documents(langchain: Any) -> None:
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda

    documents = [Document(PROSE, metadata={"page": 3}, id="a"), Document(" ", id="b")]
    compressor = langchain.TokenthriftCompressor(**TRUNCATE)
    for got in (
        compressor.compress_documents(documents, "Where are the keys?"),
        asyncio.run(compressor.acompress_documents(documents, "Where are the keys?")),
        RunnableLambda(lambda asked: compressor.compress_documents(documents, asked)).invoke("Where are the keys?"),
    ):
        assert [d.id for d in got] == ["a", "b"]
        assert got[0].metadata["page"] == 3
        check(got[0].page_content, got[0].metadata["tokenthrift"])
        assert got[1] == documents[1]
    assert documents[0] == Document(PROSE, metadata={"page": 3}, id="a")


def test_llamaindex_nodes(llamaindex: Any) -> None:
    from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, TextNode

    nodes = [
        NodeWithScore(node=TextNode(id_="a", text=PROSE, metadata={"page": 3}), score=0.7),
        NodeWithScore(node=ImageNode(id_="b"), score=0.5),
    ]
    postprocessor = llamaindex.TokenthriftPostprocessor(**TRUNCATE)
    for got in (
        postprocessor.postprocess_nodes(nodes, query_str="Where are the keys?"),
        postprocessor.postprocess_nodes(nodes),
    ):
        assert [(n.node.node_id, n.score) for n in got] == [("a", 0.7), ("b", 0.5)]
        check(got[0].node.text, got[0].node.metadata["tokenthrift"])
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert "tokenthrift" not in got[0].node.get_content(mode)
            assert "page: 3" in got[0].node.get_content(mode)
    assert nodes[0].node.text == PROSE
    assert nodes[0].node.metadata == {"page": 3}


@pytest.mark.parametrize(
    ("module", "name"), [("langchain", "TokenthriftCompressor"), ("llamaindex", "TokenthriftPostprocessor")]
)
def test_mistakes_are_told_when_it_is_made(request: pytest.FixtureRequest, module: str, name: str) -> None:
    make = getattr(request.getfixturevalue(module), name)
    with pytest.raises((ThriftError, ValueError), match="did you mean 'truncate'"):
        make(method="trunc")
    with pytest.raises((ThriftError, ValueError), match="outside"):
        make(method="truncate", rate=1.5)


@pytest.mark.parametrize(("module", "package"), [("langchain", "langchain_core"), ("llamaindex", "llama_index")])
def test_without_the_package(module: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try: import tokenthrift.integrations.{module}\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert f"pip install 'tokenthrift[{module}]'" in said.stdout
