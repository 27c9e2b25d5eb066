"""`Retries`: how often and after which delays a failed call runs again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apothic.errors import InvalidOptionError

__all__ = ["Retries"]

_MAX_RETRIES = 1000


@dataclass(frozen=True)
class Retries:
    """Policy for calls that failed by an exception of user code or by the loss of the instance.

    Args:
        max_retries: further attempts after the first, 0 to 1000.
        backoff_coefficient: factor from one delay to the next, at least 1.
        initial_delay: seconds before the first retry.
        max_delay: upper limit of a delay, in seconds.

    Raises:
        InvalidOptionError: when a value breaks its rule.
    """

    max_retries: int
    backoff_coefficient: float = 2.0
    initial_delay: float = 1.0
    max_delay: float = 60.0

    def __post_init__(self) -> None:
        """Refuse values that make no policy."""
        count = self.max_retries
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MAX_RETRIES:
            raise InvalidOptionError(
                f"max_retries={count!r} is not valid: it takes a whole number from 0 to "
                f"{_MAX_RETRIES}. Use 0 for no retries."
            )
        for name, low in (("backoff_coefficient", 1.0), ("initial_delay", 0), ("max_delay", 0)):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value < low
            ):
                raise InvalidOptionError(
                    f"{name}={value!r} is not valid: it takes a finite number of at least {low}. "
                    f"Leave it out for {type(self).__dataclass_fields__[name].default:g}."
                )
        if self.max_delay < self.initial_delay:
            raise InvalidOptionError(
                f"max_delay={self.max_delay!r} is below initial_delay={self.initial_delay!r}: the "
                f"longest delay cannot be shorter than the first. Raise max_delay."
            )

    def delay_s(self, attempt: int) -> float:
        """Give the seconds to wait before retry number ``attempt``, counted from 1."""
        # The exponent is bounded first: 2.0 ** 1100 overflows, the delay has long been max_delay.
        try:
            delay = self.initial_delay * self.backoff_coefficient ** (attempt - 1)
        except OverflowError:
            return self.max_delay
        return min(delay, self.max_delay)
