"""The thread behind a synchronous client: it runs an event loop, and other threads post to it.

Rule: no call outlives its deadline by more than GRACE_S, even if the loop's thread is starved.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from kvclient.errors import Unavailable, Unsupported, late

GRACE_S = 2.0
Result = TypeVar("Result")


class Runner:
    """The loop's thread, and how other threads post to it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="kvclient-loop", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def check(self) -> None:
        if os.getpid() != self._pid:
            raise Unsupported(
                f"this client of {self._address} was opened in process {self._pid}: "
                "nothing of it works after the fork"
            )

    def run(self, work: Coroutine[Any, Any, Result], seconds: float, what: str) -> Result:
        """Run `work` on the loop; it keeps its own deadline of `seconds`."""
        if os.getpid() != self._pid or self.loop.is_closed():
            work.close()
            self.check()
            raise Unavailable(f"{what} at {self._address}: the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(seconds + GRACE_S)
        except concurrent.futures.CancelledError:
            raise Unavailable(f"{what} at {self._address}: the client was closed") from None
        except TimeoutError:
            raise late(what, self._address, seconds) from None
        finally:
            future.cancel()  # ends it where the wait was interrupted; else does nothing

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(GRACE_S)
