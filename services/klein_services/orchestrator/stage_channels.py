"""Channels to the stages: one for each target, replaced when credentials or addresses change."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import grpc

from klein_services.orchestrator.routing import DENOISER, TEXT_ENCODER, VAE_DECODER, StageAddress
from klein_services.runtime.channels import KEEPALIVE_MILLISECONDS, open_channel
from klein_services.runtime.name_resolution import DnsName
from klein_services.runtime.tls import CredentialStore

SERVICES: Final[Mapping[str, str]] = {
    TEXT_ENCODER: "klein_api.v1.TextEncoderService",
    DENOISER: "klein_api.v1.DenoiserService",
    VAE_DECODER: "klein_api.v1.VaeDecoderService",
}
"""The gRPC service of each stage. Its health status decides whether a replica gets calls."""
_OPTIONS = (
    # A stage that came back is used within a second; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # gRPC's threads answer pings while Python computes, so a replica that does not is stopped or unreachable.
    ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MILLISECONDS),
    # gRPC 1.85 waits this long for the answer, a minute by default, whatever the timeout above.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MILLISECONDS),
    ("grpc.keepalive_permit_without_calls", 1),
)
_CONNECT_SECONDS = 5.0
"""Longest time that a channel to new addresses may take to connect before it is used all the same."""
_DAMAGED_SECONDS = 10.0
"""Time that calls get to end on a connection whose bytes were damaged; most of them are well."""
_RECONNECT_SECONDS = 2.0
"""Least time between two reconnections of a target."""
_Key = tuple[str, str]
_log = logging.getLogger("klein.orchestrator")


class Channels:
    """One channel for each target, opened when it is first needed.

    When the credentials are replaced, or the name of a DNS target gets other addresses, new calls get a new channel.
    The old one is closed behind its last call.

    Args:
        credentials: of TLS; `None` calls stages in plaintext.
        server_name: name that every stage's certificate must have; empty means the target's host.
        dns_interval_seconds: time between two looks at the addresses of DNS targets; 0 leaves that to gRPC, which
            looks when a connection ends.
        options: further options of every channel.
    """

    def __init__(
        self,
        credentials: CredentialStore | None = None,
        server_name: str = "",
        dns_interval_seconds: float = 0.0,
        options: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._store = credentials
        self._options = (*_OPTIONS, *options)
        self._server_name = server_name
        self._dns_interval_seconds = dns_interval_seconds
        self._credentials = credentials.current if credentials else None
        self._channels: dict[_Key, grpc.aio.Channel] = {}
        self._calls: Counter[grpc.aio.Channel] = Counter()
        """Calls in progress of each channel."""
        self._replaced: set[grpc.aio.Channel] = set()
        """Channels that are closed behind their last call."""
        self._reconnected: dict[str, tuple[int, float]] = {}
        """Number and time of the last reconnection of each target that had one."""
        self._users: Counter[str] = Counter()
        self._retained: frozenset[str] | None = None
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def serving(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches the stage's replicas whose health is SERVING."""
        return self._channel((address.target, SERVICES[address.stage]))

    def any(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches every replica of the stage, also those that load or drain."""
        return self._channel((address.target, ""))

    def to(self, target: str) -> grpc.aio.Channel:
        """Returns the channel to a server that is no stage."""
        return self._channel((target, ""))

    def called(self, channel: grpc.aio.Channel, call: grpc.aio.Call) -> None:
        """Keeps a channel open until a call that was just made on it has ended."""
        self._calls[channel] += 1
        is_counted = True

        def ended(_: object) -> None:
            # grpc.aio may report the end of a call twice.
            nonlocal is_counted
            if not is_counted:
                return
            is_counted = False
            self._calls[channel] -= 1
            if not self._calls[channel]:
                del self._calls[channel]
                if channel in self._replaced:
                    self._replaced.discard(channel)
                    self._spawn(channel.close())

        call.add_done_callback(ended)

    def reconnect(self, address: StageAddress, *, is_damaged: bool = True) -> None:
        """Makes new calls of a stage use new connections.

        Args:
            address: the stage.
            is_damaged: whether bytes on the present connections were damaged. Such a connection may go on with wrong
                headers, those that HTTP/2 keeps for later calls, and calls in progress may wait forever for bytes that
                went astray; so those are given some seconds.
        """
        target, now = address.target, time.monotonic()
        count, at = self._reconnected.get(target, (0, -math.inf))
        if now < at + _RECONNECT_SECONDS:
            return
        self._reconnected[target] = (count + 1, now)
        for key in [key for key in self._channels if key[0] == target]:
            channel = self._channels.pop(key)
            if is_damaged:
                self._spawn(channel.close(_DAMAGED_SECONDS))
            else:
                self._replace(channel)

    @contextmanager
    def used(self, *addresses: StageAddress) -> Iterator[None]:
        """Keeps the channels to these stages open while the block runs, also when `retain` leaves them out."""
        targets = {address.target for address in addresses}
        self._users.update(targets)
        try:
            yield
        finally:
            self._users.subtract(targets)
            self._close_unused()

    def retain(self, addresses: Iterable[StageAddress]) -> None:
        """Closes all other channels, each as soon as it is not used."""
        self._retained = frozenset(address.target for address in addresses)
        self._reconnected = {key: last for key, last in self._reconnected.items() if key in self._retained}
        self._close_unused()

    async def close(self) -> None:
        """Closes everything; calls in progress are cancelled."""
        channels, self._channels = [*self._channels.values(), *self._replaced], {}
        self._replaced.clear()
        watches, self._watches = list(self._watches.values()), {}
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)
        await asyncio.gather(*watches, return_exceptions=True)

    def _channel(self, key: _Key) -> grpc.aio.Channel:
        if self._store is not None and self._store.current is not self._credentials:
            self._credentials = self._store.current
            replaced, self._channels = list(self._channels.values()), {}
            for channel in replaced:
                self._replace(channel)
        if key not in self._channels:
            self._channels[key] = self._open(key)
            self._watch(key[0])
        return self._channels[key]

    def _open(self, key: _Key) -> grpc.aio.Channel:
        target, service = key
        options = self._options
        if target in self._reconnected:
            # Channels whose options differ share no connection.
            options = (*options, ("klein.reconnections", self._reconnected[target][0]))
        return open_channel(
            target,
            health_service=service,
            credentials=self._credentials,
            server_name=self._server_name,
            options=options,
        )

    def _replace(self, channel: grpc.aio.Channel) -> None:
        """Closes a channel that gets no new calls, now or behind its last call."""
        if self._calls[channel]:
            self._replaced.add(channel)
        else:
            self._spawn(channel.close())

    def _close_unused(self) -> None:
        self._users = +self._users
        if self._retained is None:
            return
        for key in list(self._channels):
            if key[0] not in self._retained and key[0] not in self._users:
                self._replace(self._channels.pop(key))
                if watch := self._watches.pop(key[0], None):
                    watch.cancel()

    def _watch(self, target: str) -> None:
        name = DnsName.of(target)
        if name is not None and self._dns_interval_seconds and target not in self._watches:
            self._watches[target] = asyncio.create_task(self._follow(target, name))

    async def _follow(self, target: str, name: DnsName) -> None:
        """Replaces the channels of a target whenever its name has other addresses than before."""
        known = await name.addresses()
        while True:
            await asyncio.sleep(self._dns_interval_seconds)
            found = await name.addresses()
            # No answer changes nothing: the replicas that are known may be well.
            if found and found != known:
                _log.info("%s has %d addresses now, %d before", target, len(found), len(known))
                known = found
                await asyncio.gather(*(self._renew(key) for key in list(self._channels) if key[0] == target))

    async def _renew(self, key: _Key) -> None:
        """Connects another channel, which resolves the name anew, and puts it in the place of the present one."""
        before, channel = self._channels[key], self._open(key)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            _log.warning("the new addresses of %s do not answer yet", key[0])
        except BaseException:
            self._spawn(channel.close())
            raise
        if self._channels.get(key) is before:
            self._channels[key] = channel
            self._replace(before)
        else:
            # The credentials were replaced meanwhile, or the target is not used any more.
            self._spawn(channel.close())

    def _spawn(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
