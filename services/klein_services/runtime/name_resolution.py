"""Resolution of the names in gRPC's DNS targets, to notice new replicas.

gRPC resolves a name again only when a connection to one of its addresses ends, so a client with good connections would
never learn of another replica.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from dataclasses import dataclass

_TARGET = re.compile(r"dns:(?://(?P<authority>[^/]*)/)?(?P<name>\[[^\]]+\]|[^:/\[\]]+)(?::\d+)?")
_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class DnsName:
    """The name in a target of gRPC's `dns` scheme."""

    name: str
    server: tuple[str, int] | None
    """Address and port of the DNS server that the target names; `None` asks the system's resolver."""

    @classmethod
    def of(cls, target: str) -> DnsName | None:
        """Returns the name of a target; `None` for addresses, other schemes, and targets without a scheme."""
        match = _TARGET.fullmatch(target)
        if match is None or _is_address(match["name"].strip("[]")):
            return None
        authority = match["authority"]
        if not authority:
            return cls(match["name"], None)
        host, _, port = authority.partition(":")
        if not _is_address(host) or not (port or "53").isdecimal():
            return None
        return cls(match["name"], (host, int(port or 53)))

    async def addresses(self) -> frozenset[str]:
        """Returns the addresses that the name has now; empty when it has none or no server answers."""
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                if self.server is not None:
                    return await self._answer(self.server)
                loop = asyncio.get_running_loop()
                found = await loop.getaddrinfo(self.name, None, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            return frozenset()
        return frozenset(str(address[0]) for *_, address in found)

    async def _answer(self, server: tuple[str, int]) -> frozenset[str]:
        # Only for targets that name a server, which few do; the system's resolver needs no library.
        from dns.asyncresolver import Resolver
        from dns.exception import DNSException

        resolver = Resolver(configure=False)
        resolver.nameservers, resolver.port = [server[0]], server[1]
        try:
            answer = await resolver.resolve_name(self.name, lifetime=_TIMEOUT_SECONDS)
        except DNSException:
            return frozenset()
        return frozenset(answer.addresses())


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
