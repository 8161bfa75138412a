"""Requests that the gateway makes to URLs of clients, never to an address that only the gateway can reach."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx2

MAXIMUM_URL_CHARACTERS = 2083
MAXIMUM_REDIRECTS = 3
MAXIMUM_CONNECTIONS = 64
"""Connections at a time; further requests wait, within their time."""
EVERY_HOST = "*"
_EMBEDDING_NETWORKS = {
    ipaddress.ip_network("64:ff9b::/96"): 0,
    ipaddress.ip_network("64:ff9b:1::/48"): 0,
    ipaddress.ip_network("2002::/16"): 80,
}
"""IPv6 networks whose addresses lead to an IPv4 address, and how many bits follow it."""
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)


class OutboundError(Exception):
    """A URL cannot be requested; the text is a reason that its client may see."""


@dataclass(frozen=True)
class OutboundResponse:
    """Answer of a server outside."""

    status: int
    content_type: str
    body: bytes


class Outbound:
    """Client for URLs that the gateway's own clients give.

    A host is resolved once, each of its addresses is checked, and the connection goes to the checked address, so a
    name that resolves differently a moment later changes nothing. Redirects are checked likewise. Proxies of the
    environment are ignored, because they would resolve the name anew.

    Args:
        private_hosts: names of hosts that may have private addresses; `*` allows every host.
    """

    def __init__(self, private_hosts: Collection[str]) -> None:
        self._private_hosts = frozenset(name.lower() for name in private_hosts)
        # No connection is used twice: one that was verified for a host must not serve another at the same address.
        limits = httpx2.Limits(max_connections=MAXIMUM_CONNECTIONS, max_keepalive_connections=0)
        self._client = httpx2.AsyncClient(
            trust_env=False, follow_redirects=False, timeout=None, limits=limits
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def send(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        maximum_bytes: int,
        headers: Mapping[str, str] | None = None,
        content: bytes = b"",
        redirects: int = MAXIMUM_REDIRECTS,
    ) -> OutboundResponse:
        """Sends a request and reads the answer.

        Args:
            method: of HTTP.
            url: `http://` or `https://`.
            seconds: bound of everything, redirects included.
            maximum_bytes: bound of the answer's body.
            headers: further headers.
            content: body of the request.
            redirects: most redirects to follow; 0 returns the first answer, whatever it is.

        Raises:
            OutboundError: the URL is not allowed, or its server does not answer as it should.
        """
        try:
            async with asyncio.timeout(seconds):
                for _ in range(redirects + 1):
                    answer, location = await self._send_once(
                        method, url, dict(headers or {}), content, maximum_bytes
                    )
                    if answer.status not in _REDIRECT_STATUSES or not redirects or not location:
                        return answer
                    url = urljoin(url, location)
                raise OutboundError(f"it redirects more than {redirects} times")
        except TimeoutError:
            raise OutboundError(f"it takes longer than {seconds:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            # The text of some errors has addresses; the class is enough for a client.
            raise OutboundError(f"the request fails ({type(error).__name__})") from None

    async def _send_once(
        self, method: str, url: str, headers: dict[str, str], content: bytes, maximum_bytes: int
    ) -> tuple[OutboundResponse, str]:
        parsed = parse_url(url)
        address = await self._checked_address(
            parsed.host, parsed.port or (443 if parsed.scheme == "https" else 80)
        )
        request = self._client.build_request(
            method,
            parsed.copy_with(host=address),
            headers={**headers, "Host": parsed.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            content=content or None,
            extensions={"sni_hostname": parsed.host},
        )
        response = await self._client.send(request, stream=True)
        try:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > maximum_bytes:
                    raise OutboundError(f"its answer has more than {maximum_bytes} bytes")
        finally:
            await response.aclose()
        kind = response.headers.get("content-type", "")
        return OutboundResponse(response.status_code, kind, bytes(body)), response.headers.get("location", "")

    async def _checked_address(self, host: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise OutboundError("its host has no address") from None
        addresses = [str(each[4][0]) for each in found]
        if not self._private_hosts & {EVERY_HOST, host.lower()} and not all(map(is_public, addresses)):
            raise OutboundError("its host has an address that is not public")
        return addresses[0]


def parse_url(url: str) -> httpx2.URL:
    """Parses a URL that a client has given.

    Raises:
        OutboundError: it is too long, no `http://` or `https://` URL, or has a user name or password.
    """
    if len(url) > MAXIMUM_URL_CHARACTERS:
        raise OutboundError(f"it has {len(url)} characters; at most {MAXIMUM_URL_CHARACTERS} are allowed")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise OutboundError("it is no URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise OutboundError("it must begin with http:// or https:// and name a host")
    if parsed.userinfo:
        raise OutboundError("it has a user name or password, which is not allowed")
    return parsed


def is_public(address: str) -> bool:
    """Returns whether everyone on the Internet could reach an address; false for private, loopback, link-local (where
    clouds have their metadata), multicast and reserved ones, also when they are written as an IPv6 address.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped
        for network, shift in _EMBEDDING_NETWORKS.items():
            if parsed in network:
                embedded = ipaddress.IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF)
        if parsed.teredo is not None:
            return False
        if embedded is not None:
            return is_public(str(embedded))
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved
