"""The process behind `kvserver.transfer.nixl.process`: python -m kvserver.nixl_worker FD"""

from __future__ import annotations

import os
import sys

from kvserver.runtime import failpoints
from kvserver.transfer.nixl.worker import make_agent, serve


def main() -> None:
    failpoints.arm(os.environ.get(failpoints.ENVIRONMENT_VARIABLE, ""))
    serve(int(sys.argv[1]), before_post=lambda: failpoints.hit("nixl.post"), make=make_agent)


if __name__ == "__main__":
    main()
