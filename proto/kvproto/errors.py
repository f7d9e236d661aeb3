"""One error for a value that a caller got wrong: it names the field, the value and the limit."""

from __future__ import annotations


class FieldError(ValueError):
    """A field of a public structure is out of its bounds.

    `field` is the name as the caller knows it, `limit` what would have been accepted.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        self.field = field
        self.value = value
        self.limit = limit
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} is {shown}, must be {limit}")


def require_int(field: str, value: object, low: int, high: int) -> int:
    """Return `value` when it is an int within [low, high]; raise FieldError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(field, value, f"an integer from {low} to {high}")
    return value
