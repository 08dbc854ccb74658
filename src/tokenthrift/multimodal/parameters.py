"""Parameters that methods on visual tokens share, checked."""

from __future__ import annotations

from ..core.errors import ThriftError


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
