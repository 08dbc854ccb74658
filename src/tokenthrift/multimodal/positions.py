"""The parameter of connector methods that says which positions the language model gives to what is left."""

from __future__ import annotations

from ..core.errors import ThriftError, did_you_mean

POLICIES = ("gapless", "original")


def check_positions(name: str, positions: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        ThriftError: names the policies.
    """
    if positions not in POLICIES:
        raise ThriftError(f"{name} has no positions={positions!r}: {did_you_mean(str(positions), POLICIES)}")
