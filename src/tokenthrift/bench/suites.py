"""The suites by name, with their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core.errors import ThriftError, did_you_mean
from .needle import NeedleSuite
from .questions import Questions
from .ruler import RulerSuite
from .tasks import SUITES, Suite

AnySuite = Suite | Questions


def find_suite(suite: str | AnySuite, repeats: int | None, options: Mapping[str, Any]) -> AnySuite:
    """The suite of this name, with the options that are not None.

    Raises:
        ThriftError: an unknown suite, an option that it does not have, or a value that it refuses.
    """
    if isinstance(suite, str):
        named: dict[str, AnySuite] = {**SUITES, "needle": NeedleSuite(), "ruler": RulerSuite()}
        if suite not in named:
            raise ThriftError(f"unknown suite '{suite}': {did_you_mean(suite, named)}")
        suite = named[suite]
    if repeats is not None:
        if repeats < 1:
            raise ThriftError(f"repeats must be at least 1, not {repeats}")
        if isinstance(suite, Questions):
            raise ThriftError(f"the suite '{suite.name}' times every case once: leave --repeats out, or add --samples")
        suite = dataclasses.replace(suite, repeats=repeats)
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if not isinstance(suite, Questions) or name not in (field.name for field in dataclasses.fields(suite)):
            of = {"depths": "suite needle", "tasks": "suite ruler"}.get(name, "suites needle and ruler")
            raise ThriftError(f"--{name.replace('_', '-')} is an option of the {of}, not of {suite.name}: leave it out")
        if name in ("lengths", "depths", "tasks"):
            given[name] = (value,) if isinstance(value, str | int | float) else tuple(value)
    return dataclasses.replace(suite, **given)
