"""Parameters that methods on visual tokens share."""

from __future__ import annotations

from ..core.errors import ThriftError, did_you_mean

POSITIONS = ("gapless", "original")
"""Positions of what is left, in the language model: consecutive, or with gaps where tokens went."""


def check_positions(method: str, positions: str) -> None:
    """Refuse positions that there are not."""
    if positions not in POSITIONS:
        raise ThriftError(f"{method} has no positions='{positions}': {did_you_mean(positions, POSITIONS)}")


def check_share(method: str, name: str, share: float) -> None:
    """Refuse what is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise ThriftError(f"{method} {name}={share} is outside [0, 1]: write the share as a number such as 0.5")


def encoder_layer(method: str, name: str, layer: int, count: int) -> int:
    """The layer, counted from 0; ``layer`` may count from the end, as in Python's lists.

    Raises:
        ThriftError: the encoder has no such layer.
    """
    if not -count <= layer < count:
        raise ThriftError(
            f"{method} {name}={layer}: the encoder has {count} layers; name one of {-count} to {count - 1}"
        )
    return layer % count
