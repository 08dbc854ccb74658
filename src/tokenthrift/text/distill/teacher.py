"""The teacher: any model behind an OpenAI-compatible endpoint that shortens texts by leaving words out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...core.errors import ThriftError

SYSTEM = (
    "You are an expert in language who shortens texts. You leave out the words that a reader can do without, and keep "
    "as much of the information as possible."
)
INSTRUCTION = """\
Shorten the text below so that you could later write the whole of it again from what is left. Keep to these rules:
1. Leave words out. Change nothing else.
2. The words that stay are in the order in which they were.
3. No word that stays is altered: no other form of it, no synonym.
4. Use no abbreviations and no emoji.
5. Add no word and no sign.
Leave out as many words as you can while all that matters is still said. Answer with the shortened text alone.

{text}
"""
"""The paper's five rules, in our words."""


def ask(
    texts: Sequence[str],
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    client: Any = None,
    workers: int = 4,
    system: str = SYSTEM,
    instruction: str = INSTRUCTION,
    temperature: float = 0.3,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, str]]:
    """``(number, shortened text)`` of each text, as the answers come.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint; the client's own default where it is None.
        api_key: where it is None, the client looks for ``OPENAI_API_KEY``; local servers need none.
        client: an ``openai.OpenAI``, in the place of a new one.
        workers: requests at once.
        temperature: 0.3 is the authors' value.

    Raises:
        ThriftError: the endpoint refuses, or does not answer after the client's own retries.
    """
    client = client or _client(base_url, api_key)

    def one(item: tuple[int, str]) -> tuple[int, str]:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": instruction.format(text=item[1])},
        ]
        more = {} if max_tokens is None else {"max_tokens": max_tokens}
        try:
            answer = client.chat.completions.create(
                model=model, messages=messages, temperature=temperature, top_p=1, **more
            )
        except Exception as error:  # whatever the client raises: its classes are not imported here
            raise ThriftError(f"the teacher {model} did not answer: {type(error).__name__}: {error}") from None
        return item[0], (answer.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            yield from pool.map(one, enumerate(texts))
        finally:
            pool.shutdown(cancel_futures=True)


def ask_into(
    path: str | os.PathLike[str],
    texts: Sequence[str],
    model: str,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Append ``{"text": ..., "compressed": ...}`` lines to a file; texts that it has already are not asked for again.

    Args:
        options: see :func:`ask`.

    Returns:
        how many texts were asked for.
    """
    path = Path(path)
    known = {sample["text"] for sample in read_jsonl(path, ("text", "compressed"))} if path.exists() else set()
    todo = [text for text in dict.fromkeys(texts) if text not in known]
    with path.open("a", encoding="utf-8") as file:
        for done, (number, short) in enumerate(ask(todo, model, **options), start=1):
            file.write(json.dumps({"text": todo[number], "compressed": short}, ensure_ascii=False) + "\n")
            file.flush()
            if progress is not None:
                progress(done, len(todo))
    return len(todo)


def read_jsonl(path: str | os.PathLike[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ThriftError: the file is missing, or a line has not all of the keys.
    """
    found: list[dict[str, Any]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ThriftError(f"cannot read {os.fspath(path)}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            item = None
        if not isinstance(item, dict) or any(key not in item for key in keys):
            raise ThriftError(f"line {number} of {os.fspath(path)} is no JSON object with {', '.join(keys)}")
        found.append(item)
    return found


def _client(base_url: str | None, api_key: str | None) -> Any:
    try:
        from openai import OpenAI
    except ImportError:
        raise ThriftError("asking a teacher needs the openai client: pip install 'tokenthrift[distill]'") from None
    key = api_key or os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)
    if key is None:
        raise ThriftError("give the teacher's base_url, or set OPENAI_API_KEY")
    return OpenAI(base_url=base_url, api_key=key)
