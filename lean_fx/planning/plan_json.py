"""Write a plan as JSON, and read it back; a file may come from anywhere, so reading checks it."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
from typing import Any

from lean_fx.errors import ArgumentError, PlanError
from lean_fx.graph.sites import Consumer, Site
from lean_fx.planning.plans import PLAN, Plan
from lean_fx.reduction.base import check_channels
from lean_fx.reduction.registry import reduction_name, reductions, registered_name
from lean_fx.skip_reason import LeftAlone, SkipReason

_VERSION = 4
_MOST_AXES = 64  # the limit of most functions of torch


def plan_to_json(plan: Plan) -> str:
    """The text of a plan.

    Raises:
        PlanError: the reduction is a class without a registered name.
    """
    name = registered_name(plan.reduction)
    if name is None:
        raise PlanError(
            f"plan: the reduction {reduction_name(plan.reduction)} has no registered name; "
            "give it one with lean_fx.register_reduction('my_name', factory)"
        )
    content = {"format": PLAN, "version": _VERSION}
    content |= dataclasses.asdict(dataclasses.replace(plan, reduction=name))
    return json.dumps(content, indent=1)


def plan_from_json(text: str) -> Plan:
    """Read a plan.

    Args:
        text: the result of :func:`plan_to_json`.

    Raises:
        PlanError: the text is not a plan, its version is unknown, or its reduction is not
            registered.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        form, version = content.pop("format"), content.pop("version")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise PlanError(
            f"plan: the text is not a plan in JSON ({error}); give Plan.to_json()"
        ) from error
    if (form, version) != (PLAN, _VERSION):
        raise PlanError(
            f"plan: format {form!r} version {version!r} is not {PLAN!r} version {_VERSION}; "
            "make the plan anew"
        )
    try:
        plan = _plan_from(content)
    except (TypeError, KeyError, AttributeError, ArgumentError) as error:
        raise PlanError(f"plan: a part is missing or wrong ({error}); make it anew") from error
    plan.check()
    if plan.reduction not in reductions():
        raise PlanError(
            f"plan: the reduction {plan.reduction!r} is not registered; call "
            f"lean_fx.register_reduction({plan.reduction!r}, factory) first"
        )
    return plan


def _plan_from(content: dict[str, Any]) -> Plan:
    """The plan of a parsed text; anything wrong in it raises, mostly a TypeError."""
    sites = [_site_from(entry) for entry in content.pop("sites")]
    left = [_left_alone_from(entry) for entry in content.pop("left_alone")]
    plan = Plan(
        sites=tuple(sites),
        left_alone=tuple(left),
        split_layers=_names("split_layers", content.pop("split_layers", ())),
        weights=_names("weights", content.pop("weights", ())),
        sensitivity=_sensitivity(content.pop("sensitivity")),
        **content,
    )
    for part in (plan, *left):
        _check_types(part)
    if plan.form not in ("graph", "module"):
        raise TypeError(f"form={plan.form!r} is neither 'graph' nor 'module'")
    if plan.form == "graph" and not plan.traced:
        raise TypeError("traced=False has form='module'")
    return plan


def _check_types(part: Any) -> None:
    """Check the plain fields of a dataclass by their annotations."""
    kinds = {"str": str, "int": int, "int | None": int | None, "float": float | int, "bool": bool}
    kinds["str | None"] = str | None
    for field in dataclasses.fields(part):
        kind, value = kinds.get(str(field.type)), getattr(part, field.name)
        if kind is not None and (not isinstance(value, kind) or type(value) is bool is not kind):
            raise TypeError(f"{field.name}={value!r} is not {field.type}")


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise TypeError(f"{key}={reprlib.repr(value)} is not a list of names of layers")
    return tuple(value)


def _sensitivity(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = [each for each in value if type(each) is float] if isinstance(value, list) else []
    if not len(numbers) == 2 == len(value) or not all(0 <= each < math.inf for each in numbers):
        raise TypeError(f"sensitivity={value!r} is not two numbers of 0 or more")
    before, after = numbers
    return before, after


def _left_alone_from(entry: dict[str, Any]) -> LeftAlone:
    return LeftAlone(**{**entry, "reason": SkipReason(**entry["reason"])})


def _site_from(entry: dict[str, Any]) -> Site:
    consumers = [
        Consumer(**{**each, "path": tuple(each["path"])}) for each in entry.pop("consumers")
    ]
    site = Site(consumers=tuple(consumers), **entry)
    for part in (site, *consumers):
        _check_types(part)
    texts = [site.name, *(t for c in consumers for t in (c.layer, *c.path))]
    if site.value:
        texts += [consumer.node for consumer in consumers]
    elif len(consumers) != 1:
        raise TypeError("a site without a value has one layer")
    if not consumers or not all(isinstance(text, str) and text for text in texts):
        raise TypeError(f"site {site.value!r} has no consumers, or a part without a name")
    check_channels("site", site.in_channels, site.out_channels or 0)
    if site.groups < 1:
        raise TypeError(f"site {site.value!r} has groups={site.groups}, below 1")
    if not -_MOST_AXES <= site.dim < _MOST_AXES:
        raise TypeError(f"site {site.value!r} has dim={site.dim}, which no tensor has")
    if not 0 <= site.rms <= sys.float_info.max:
        raise TypeError(f"site {site.value!r} has rms={site.rms}, which no value has")
    return site
