"""One running hub, as the service sees it: what needs the core and something of the shell together.

Rule 1: a namespace is written down (arena, journal) before its handle is given out.
Rule 2: a session lives here exactly as long as the core knows it (`sweep`).
Rule 3: a session opens namespaces of its own tenant only.
"""

from __future__ import annotations

import asyncio
import logging
import time

from kvproto.namespace import NamespaceSpec

from kvserver.core import events
from kvserver.core.errors import CoreError, ErrorKind
from kvserver.runtime.driver import Driver
from kvserver.runtime.entries import HostEntries
from kvserver.runtime.mover import Mover
from kvserver.runtime.sessions import Session, Sessions
from kvserver.tiers.host import HostArena
from kvserver.tiers.liveness import Liveness
from kvserver.tiers.names import NamespaceLog

SWEEP_S = 1.0
