"""The harness's own command line, where ``--model tokenthrift`` is known."""

from __future__ import annotations

import sys

from . import TokenthriftLM  # noqa: F401  (registers the model)


def main() -> None:
    """Run it; a mistake in what Tokenthrift was asked for is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    from ...core.errors import ThriftError

    try:
        cli_evaluate()
    except ThriftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
