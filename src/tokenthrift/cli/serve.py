"""`tokenthrift serve`: an OpenAI-compatible gateway that shortens prompts by policy."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import ThriftError


def serve(
    policy: Annotated[Path | None, typer.Option(help="A policy file (YAML): upstream, routes, prices, limits.")] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="The server behind the gateway, e.g. https://api.openai.com/v1; overrides the policy's."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Without a policy: the text method for messages before the last user turn.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Without a policy: share of the tokens to keep, in (0, 1].")] = 0.5,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8100,
    check: Annotated[bool, typer.Option("--check", help="Only check the policy, and say what it does.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say it as JSON.")] = False,
) -> None:
    """Serve an OpenAI-compatible gateway in front of an upstream.

    Prompts are shortened as the policy says; answers, streams included, pass through untouched. When shortening fails
    or takes too long, the original goes out. Clients send their own key; headers x-tokenthrift-* say what was done.
    """
    from ..integrations.gateway.policy import Policy, Route

    if policy is not None:
        if method is not None:
            raise ThriftError("--method is for use without --policy: write the method into the policy's routes")
        chosen = Policy.load(policy) if upstream is None else replace(Policy.load(policy), upstream=upstream)
    elif upstream is None:
        raise ThriftError("name the server behind the gateway: --upstream https://api.openai.com/v1, or --policy FILE")
    else:
        chosen = Policy(upstream, (Route(method=method, rate=rate),) if method else ())
    if check:
        typer.echo(json.dumps(asdict(chosen), indent=2) if as_json else _summary(chosen))
        return

    try:
        from ..integrations.gateway import server
    except ModuleNotFoundError as error:
        raise ThriftError(
            f"tokenthrift serve needs {error.name}, which is not installed: pip install 'tokenthrift[serve]'"
        ) from None

    on = server.listen(host, port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    address = f"http://{f'[{host}]' if ':' in host else host}:{on.getsockname()[1]}"
    said = {"base_url": f"{address}/v1", "page": f"{address}/" if chosen.page else None, "upstream": chosen.upstream}
    typer.echo(json.dumps(said) if as_json else _welcome(said))
    server.run(chosen, on)


def _welcome(said: dict[str, str | None]) -> str:
    page = f"; its page is {said['page']}" if said["page"] else ""
    return f"point clients at {said['base_url']} (in front of {said['upstream']}){page}"


def _summary(policy: object) -> str:
    from ..integrations.gateway.policy import Policy

    assert isinstance(policy, Policy)
    lines = [f"upstream {policy.upstream}"]
    for route in policy.routes:
        what = f"{route.method} at rate {route.rate}, within {route.time_budget:g} s" if route.method else "unchanged"
        lines.append(f"{route.name}: {route.path}, model {route.model}: {what}")
    return "\n".join([*lines, "anything else: unchanged"])
