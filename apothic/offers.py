"""`OfferFiltersModel`: conditions on the fields of an offer, named as in the vast.ai offers API."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from apothic.errors import InvalidOptionError

__all__ = ["FILTER_FIELDS", "FilterField", "OfferFiltersModel", "Operator"]

Operator = Literal["eq", "neq", "gt", "gte", "lt", "lte", "in", "notin"]
# From JSON, pydantic would leave lists where the checks made tuples.
_AsTuple = AfterValidator(tuple)
NumberFilter = Mapping[Operator, float | Annotated[Sequence[float], _AsTuple]]
TextFilter = Mapping[Operator, str | Annotated[Sequence[str], _AsTuple]]
FlagFilter = Mapping[Operator, bool | Annotated[Sequence[bool], _AsTuple]]

_OPERATORS: tuple[Operator, ...] = get_args(Operator)
_ORDERED = frozenset({"gt", "gte", "lt", "lte"})
_LISTED = frozenset({"in", "notin"})


@dataclass(frozen=True, slots=True)
class FilterField:
    """What one field of an offer holds.

    Attributes:
        kind: the type of its values.
        unit: the unit of a number; empty where it has none.
        high: the largest value that makes sense.
    """

    kind: Literal["number", "text", "flag"]
    unit: str = ""
    high: float = math.inf


FILTER_FIELDS: Mapping[str, FilterField] = {
    "gpu_name": FilterField("text"),
    "num_gpus": FilterField("number", "GPUs"),
    "gpu_ram": FilterField("number", "MB"),
    "gpu_mem_bw": FilterField("number", "GB/s"),
    "total_flops": FilterField("number", "TFLOPS"),
    "cpu_cores_effective": FilterField("number", "cores"),
    "cpu_ram": FilterField("number", "MB"),
    "cpu_ghz": FilterField("number", "GHz"),
    "disk_space": FilterField("number", "GB"),
    "disk_bw": FilterField("number", "MB/s"),
    "inet_up": FilterField("number", "Mbit/s"),
    "inet_down": FilterField("number", "Mbit/s"),
    "dph_total": FilterField("number", "USD/h"),
    "reliability": FilterField("number", high=1.0),
    "geolocation": FilterField("text"),
    "verified": FilterField("flag"),
    "datacenter": FilterField("flag"),
}
"""Every field that can be filtered on; they describe the whole node, not the slice taken of it."""


class OfferFiltersModel(BaseModel):
    """Conditions that an offer must meet, all of them; each field takes ``{operator: value}``.

    Numbers take every operator; text and flags take ``eq``, ``neq``, ``in`` and ``notin``. ``in``
    and ``notin`` take a list. An offer that does not state a field does not meet a condition on it.
    A wrong field, operator or value raises `InvalidOptionError` from `parse`, and pydantic's
    ``ValidationError`` with the same text from the constructor.

    Attributes:
        gpu_name: the GPU; names mean what they mean for ``gpu`` (case and brand do not count, and
            a label on memory picks the card of a family: ``A100-80GB``), and one that this release
            does not know is compared as it is written.
        num_gpus: GPUs of the node. It does not take any: that is what ``gpu_count`` is for.
        gpu_ram: memory per GPU in MB.
        gpu_mem_bw: memory bandwidth per GPU in GB/s.
        total_flops: FP32 TFLOPS of all GPUs of the node.
        cpu_cores_effective: CPU cores of the node.
        cpu_ram: memory of the node in MB.
        cpu_ghz: CPU clock in GHz.
        disk_space: disk of the node in GB.
        disk_bw: disk bandwidth in MB/s.
        inet_up: upload bandwidth in Mbit/s.
        inet_down: download bandwidth in Mbit/s.
        dph_total: price of the whole node in USD per hour.
        reliability: share of the time that it is up, 0 to 1.
        geolocation: country code or region; the condition holds if it holds for either, ``neq``
            and ``notin`` only if they hold for both.
        verified: whether the provider has verified it.
        datacenter: whether it stands in a data centre, as for ``secure_cloud_only``.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    gpu_name: TextFilter | None = None
    num_gpus: NumberFilter | None = None
    gpu_ram: NumberFilter | None = None
    gpu_mem_bw: NumberFilter | None = None
    total_flops: NumberFilter | None = None
    cpu_cores_effective: NumberFilter | None = None
    cpu_ram: NumberFilter | None = None
    cpu_ghz: NumberFilter | None = None
    disk_space: NumberFilter | None = None
    disk_bw: NumberFilter | None = None
    inet_up: NumberFilter | None = None
    inet_down: NumberFilter | None = None
    dph_total: NumberFilter | None = None
    reliability: NumberFilter | None = None
    geolocation: TextFilter | None = None
    verified: FlagFilter | None = None
    datacenter: FlagFilter | None = None

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: object) -> object:
        return value if isinstance(value, OfferFiltersModel) else _checked_filters(value)

    @classmethod
    def parse(cls, value: object) -> Self:
        """Make the model from ``{field: {operator: value}}``; a model is given back as it is.

        Raises:
            InvalidOptionError: naming the field and operator, the value, the rule and the remedy.
        """
        if isinstance(value, cls):
            return value
        return cls.model_validate(_checked_filters(value))

    def conditions(self) -> Iterator[tuple[str, Operator, object]]:
        """Give every condition as field, operator and value; ``in`` and ``notin`` have tuples."""
        for field in FILTER_FIELDS:
            conditions: Mapping[Operator, object] | None = getattr(self, field)
            for operator, value in (conditions or {}).items():
                yield field, operator, value

    @property
    def is_empty(self) -> bool:
        """Whether there is no condition at all."""
        return next(self.conditions(), None) is None

    def __hash__(self) -> int:
        return hash(tuple(self.conditions()))


def _refuse(name: str, value: object, rule: str, remedy: str) -> InvalidOptionError:
    return InvalidOptionError(f"{name}={value!r} is not valid: {rule}. {remedy}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(each) for each in close)}?"
    return f"Known are: {', '.join(known)}."


def _checked_filters(value: object) -> dict[str, dict[Operator, object]]:
    """Check the plain form; the result is equal for equal filters, in whatever order written."""
    if not isinstance(value, Mapping):
        raise _refuse(
            "offer_filters",
            value,
            "it takes an OfferFiltersModel or a dict of {field: {operator: value}}",
            "Write for instance offer_filters={'gpu_ram': {'gte': 24000}}.",
        )
    for field in value:
        if field not in FILTER_FIELDS:
            raise InvalidOptionError(
                f"offer_filters has no field {field!r}. {_nearest(str(field), list(FILTER_FIELDS))}"
            )
    return {
        field: _checked_conditions(field, value[field])
        for field in FILTER_FIELDS
        if value.get(field) is not None
    }


def _checked_conditions(field: str, value: object) -> dict[Operator, object]:
    name = f"offer_filters.{field}"
    if not isinstance(value, Mapping) or not value:
        raise _refuse(
            name,
            value,
            "a field takes {operator: value} with at least one operator",
            f"Write for instance {{{field!r}: {{'eq': {value!r}}}}}; "
            f"operators are {', '.join(_OPERATORS)}.",
        )
    for operator in value:
        if operator not in _OPERATORS:
            raise InvalidOptionError(
                f"{name} has no operator {operator!r}. {_nearest(str(operator), _OPERATORS)}"
            )
        if operator in _ORDERED and FILTER_FIELDS[field].kind != "number":
            raise _refuse(
                f"{name}.{operator}",
                value[operator],
                f"{field} has no order, so it takes eq, neq, in and notin",
                "Use one of them.",
            )
    checked: dict[Operator, object] = {
        operator: _checked_value(f"{name}.{operator}", field, operator, value[operator])
        for operator in _OPERATORS
        if operator in value
    }
    _check_range(name, checked)
    return checked


def _checked_value(name: str, field: str, operator: Operator, value: object) -> object:
    if operator not in _LISTED:
        return _checked_scalar(name, field, value)
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, AbstractSet)):
        raise _refuse(name, value, f"{operator} takes a list", f"Write [{value!r}].")
    if not value:
        raise _refuse(name, value, "an empty list names nothing", "List values or leave it out.")
    items = {_checked_scalar(name, field, item) for item in value}
    return tuple(sorted(items))


def _checked_scalar(name: str, field: str, value: object) -> float | str | bool:
    spec = FILTER_FIELDS[field]
    if spec.kind == "flag":
        if not isinstance(value, bool):
            raise _refuse(name, value, f"{field} is true or false", "Write True or False.")
        return value
    if spec.kind == "text":
        if not isinstance(value, str) or not value.strip():
            raise _refuse(name, value, f"{field} is a text", "Write a string that is not empty.")
        return value.strip()
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    if not math.isfinite(number) or not 0 <= number <= spec.high:
        limit = f" up to {spec.high:g}" if math.isfinite(spec.high) else ""
        raise _refuse(
            name,
            value,
            f"{field} is a finite number of at least 0{limit}",
            f"Give it in {spec.unit}." if spec.unit else "Give a share, such as 0.95.",
        )
    return number


def _check_range(name: str, checked: Mapping[Operator, object]) -> None:
    """Refuse bounds that no number meets."""
    low = max((v for op in ("gt", "gte") if isinstance(v := checked.get(op), float)), default=None)
    high = min((v for op in ("lt", "lte") if isinstance(v := checked.get(op), float)), default=None)
    if low is None or high is None:
        return
    if low > high or (low == high and (checked.get("gt") == low or checked.get("lt") == high)):
        raise _refuse(
            name, dict(checked), "no number is in this range", "Widen one of the two bounds."
        )
