"""Which transport a session uses.

`auto` takes the first of these that the hub offers and this process can open:

    shm    this process sees the hub's socket: one host, and the hub trusts the tenant
    nixl   both sides have NIXL and an RDMA device
    tcp    everywhere else

Without RDMA, NIXL moves over the same sockets as tcp and costs more: then it is taken only where it
is asked for by name.

Rule 1: a transport that was named is opened, or the connection fails.
Rule 2: with `auto`, what was offered and could not be opened is told in the error of the last.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kvclient.errors import DeadlineExceeded, KVError, Unavailable, Unsupported
from kvclient.timing import Deadline
from kvclient.tls import Tls
from kvclient.transfer import nixl, shm, tcp
from kvclient.transfer.base import Transfer
from kvclient.transfer.settling import Rpc, settle_orphans
from kvproto import nixlib
from kvproto.rdma import rdma_devices

if TYPE_CHECKING:
    from kvclient.options import Options

TRANSPORTS = ("shm", "nixl", "tcp")  # what this client speaks, best first
Message = Any


async def open_transfer(options: Options, hello: Message, deadline: Deadline, rpc: Rpc) -> Transfer:
    """The Transfer of a session that was just opened. KVErrors name the hub and its offers.

    `rpc(name, request, deadline)` makes a call to the same hub.
    """
    await settle_orphans(hello, rpc, once=True)
    offers = {offer.name: offer for offer in hello.transports}
    where = f"the hub at {options.address} offers {', '.join(offers) or 'no transport'}"
    wanted = TRANSPORTS if options.transport == "auto" else (options.transport,)
    usable = [name for name in wanted if name in offers]
    if options.transport == "auto" and not _has_rdma(offers.get("nixl")):
        usable = [name for name in usable if name != "nixl"]
    if not usable:
        raise Unsupported(f"{where}; this client wants {' or '.join(wanted)}")
    failures: list[str] = []
    for name in usable:
        last = name == usable[-1]
        try:
            transfer = await _open(name, options, hello, offers[name], deadline, rpc)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{where}; {error}", field="deadline_s") from error
        except KVError as error:
            hint = ". shm needs this process on the hub's host" if name == "shm" else ""
            failures.append(f"{name}: {error}{hint}")
            if last:
                kind = Unsupported if isinstance(error, Unsupported) else Unavailable
                raise kind(f"{where}; {'; '.join(failures)}") from error
            continue
        if (transfer.epoch, transfer.arena_id) != (hello.epoch, hello.arena_id):
            transfer.close()
            raise Unavailable(f"the hub at {options.address} was restarted during the handshake")
        return transfer
    raise AssertionError("unreachable")


def _has_rdma(offer: Message | None) -> bool:
    """Whether NIXL would move by RDMA: both sides have a device, and this one the library."""
    return (
        offer is not None
        and bool(offer.options.get("rdma"))
        and bool(rdma_devices())
        and nixlib.available()
    )


def _tls(options: Options, offer: Message) -> Tls | None:
    """What the data port speaks. Unsupported where only one side does."""
    offered = bool(offer.options.get("tls"))
    if offered and options.tls is None:
        raise Unsupported("its data port speaks TLS, and this client has no `tls`", field="tls")
    if options.tls is not None and not offered:
        raise Unsupported("its data port speaks no TLS, and this client asks for it", field="tls")
    return options.tls


async def _open(
    name: str, options: Options, hello: Message, offer: Message, deadline: Deadline, rpc: Rpc
) -> Transfer:
    left = max(deadline.left(), 1e-3)
    if name == "nixl":
        return await nixl.open_nixl(
            hello,
            backend=offer.options.get("backend", nixl.BACKEND),
            params=options.nixl_params,
            staging_bytes=options.staging_bytes,
            rpc=rpc,
            memories=options.memories if options.direct else None,
            deadline=Deadline(max(left, options.staging_s)),
        )
    if name == "shm":
        return await asyncio.to_thread(
            shm.open_arena,
            offer.address,
            session=hello.session,
            client=hello.client,
            token=hello.token,
            read_only=options.read_only,
            deadline_s=left,
        )
    return await tcp.open_tcp(
        tcp.address_of(offer.address, options.address),
        session=hello.session,
        client=hello.client,
        token=hello.token,
        connections=options.connections,
        tls=_tls(options, offer),
        deadline_s=left,
    )
