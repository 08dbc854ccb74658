"""How well a vision-language model answers questions about held-out scenes."""

from __future__ import annotations


def prompt(question: str, image: bool = True) -> str:
    """The prompt of a question, as thrift-vlm was trained on it."""
    return f"{'<image> ' if image else ''}{question} answer:"
