"""What stands in the catalogue: a dataclass of options with a card."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.card import Card
from saccade.core.errors import OptionError


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    helper: bool = False,
) -> Any:
    """A documented option, checked when the system is made. A `helper`, such as a detector, must be given
    before a driver runs."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "helper": helper}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(eq=False, kw_only=True)
class System:
    """Options only; a method, a driver or an experiment says what is done with them."""

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        names = {field.name for field in dataclasses.fields(self)}
        for cls in type(self).__mro__[: type(self).__mro__.index(System)]:
            if "__dataclass_params__" not in vars(cls) and (lost := names & set(vars(cls))):
                raise OptionError(
                    f"{cls.__name__} sets {', '.join(sorted(lost))}, which is no option of it: it is no "
                    "dataclass.",
                    "write @dataclass(eq=False) above the class",
                )
        for field in dataclasses.fields(self):
            check_option(type(self), field, getattr(self, field.name))


def check_option(owner: type, field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value outside of what the option's declaration allows."""
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    name = f"{owner.__name__}({field.name}={value!r})"
    doc = field.metadata.get("doc", "")
    if choices is not None and value not in choices:
        raise OptionError(f"{name}: not one of {', '.join(map(repr, choices))}.", f"{field.name}: {doc}")
    if low is None and high is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise OptionError(f"{name}: a number is wanted.", f"{field.name}: {doc}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = (
            f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        )
        raise OptionError(f"{name}: out of range, {limits} is allowed.", f"{field.name}: {doc}")
