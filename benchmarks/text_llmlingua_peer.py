"""The llmlingua package as the peer of `text_llmlingua.py`, in an environment of its own.

Jobs come as JSON lines on standard input, results leave as JSON lines. It needs llmlingua==0.2.2 and transformers below
4.48, whose cache still looks like tuples. No tiktoken vocabulary is fetched: it is only used to count.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import tiktoken
import torch
import transformers


class Counter:
    """Stands in for the tokenizer of an OpenAI model, which the package only counts with."""

    def encode(self, text: str) -> list[str]:
        return text.split()


def main() -> None:
    first = json.loads(sys.stdin.readline())
    torch.set_num_threads(first["threads"])
    tiktoken.encoding_for_model = lambda _: Counter()
    from llmlingua import PromptCompressor, prompt_compressor

    prompt_compressor.AutoTokenizer = transformers.PreTrainedTokenizerFast
    compressor = PromptCompressor(first["model"], device_map="cpu")
    kept: dict[str, Any] = {}
    compress = compressor.iterative_compress_prompt

    def noted(*args: Any, **kwargs: Any) -> Any:
        kept["ids"], mask = compress(*args, **kwargs)
        return kept["ids"], mask

    compressor.iterative_compress_prompt = noted
    print(json.dumps({"transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = perf_counter()
        compressor.compress_prompt(job.pop("documents"), **job)
        seconds = perf_counter() - start
        print(json.dumps({"seconds": seconds, "ids": kept["ids"][0].tolist()}), flush=True)


if __name__ == "__main__":
    main()
