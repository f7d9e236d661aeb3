"""Everything that the proxy itself answers with an error, in the shape of OpenAI's API.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

What an engine answers is passed on as it is and never becomes one of these.
"""

from __future__ import annotations

import json

_TYPES = {400: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1


class ProxyError(Exception):
    """A request ends here. `code` names the limit or the cause."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        super().__init__(message)

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body's: who is refused for want of room is told when to come again."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    def body(self) -> bytes:
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, "server_error"),
            "param": None,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


def over(code: str, limit: int, what: str, *, status: int = 429) -> ProxyError:
    """A limit was reached: `code` is its option."""
    return ProxyError(status, code, f"{what} (limit {code} = {limit})")
