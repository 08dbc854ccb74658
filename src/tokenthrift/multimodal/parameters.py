"""Parameters that methods on visual tokens share, checked."""

from __future__ import annotations

from ..core.errors import ThriftError, did_you_mean
from ..models.connector_positions import POLICIES


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


def check_positions(name: str, positions: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        ThriftError: names the policies.
    """
    if positions not in POLICIES:
        raise ThriftError(f"{name} has no positions={positions!r}: {did_you_mean(str(positions), POLICIES)}")
