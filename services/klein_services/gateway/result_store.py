"""Result stores: places from which clients fetch images by a link that expires."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

PATH = "/results"
"""Path under which the gateway serves the files of a local store."""
SECRET_BYTES = 32
SWEEP_SECONDS = 60.0
"""Time between two looks for files that are too old."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SUFFIX = ".result"
"""Suffix of the store's own files; others in the folder are never touched."""
_TEMPORARY_SUFFIX = ".new"
_SECRET = ".secret"
_CONNECT_SECONDS = 5
_READ_SECONDS = 30


class ResultStore(ABC):
    """Store of image files by key. Keys are letters, digits, `_` and `-`, at most 100."""

    @abstractmethod
    async def put(self, key: str, data: bytes, content_type: str) -> None:
        """Writes a file; one of that key is replaced.

        Raises:
            OSError: the store failed.
        """

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Deletes a file; one that is not there is no error.

        Raises:
            OSError: the store failed.
        """

    @abstractmethod
    def url(self, key: str, base_url: str, seconds: float) -> str:
        """Returns a link to a file, for everyone who has the link.

        Args:
            key: of the file.
            base_url: URL under which the client reaches the gateway.
            seconds: time for which the link works.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends the work of the store; its files stay."""


class LocalResultStore(ResultStore):
    """A folder, from which the gateway itself serves. The oldest files give way to new ones.

    Args:
        folder: made if it does not exist. Gateways may share one; it has the secret that signs links.
        maximum_bytes: bound of all files.
        seconds: age at which files are deleted.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, maximum_bytes: int, seconds: float) -> None:
        self.folder = folder
        self._maximum_bytes = maximum_bytes
        self._seconds = seconds
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._secret = _shared_secret(folder / _SECRET)
        self._writing = asyncio.Lock()
        self._held_bytes = self._sweep(0)
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to delete files that are too old."""
        self._sweeping = asyncio.create_task(self._sweep_regularly(), name="results")

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        path = self._path(key)
        if len(data) > self._maximum_bytes:
            raise OSError(f"the file has {len(data)} bytes; KLEIN_RESULTS_MIB allows less for all files")
        async with self._writing:
            self._held_bytes -= await asyncio.to_thread(_remove, path)
            if self._held_bytes + len(data) > self._maximum_bytes:
                self._held_bytes = await asyncio.to_thread(self._sweep, len(data))
            await asyncio.to_thread(_write, path, data)
            self._held_bytes += len(data)

    async def delete(self, key: str) -> None:
        async with self._writing:
            self._held_bytes -= await asyncio.to_thread(_remove, self._path(key))

    def url(self, key: str, base_url: str, seconds: float) -> str:
        expires = int(time.time() + seconds)
        return f"{base_url}{PATH}/{key}?expires={expires}&signature={self._signature(key, expires)}"

    async def read(self, key: str, expires: str, signature: str) -> bytes | None:
        """Returns the file of a link; `None` when the link is wrong or has expired, or the file is gone."""
        if not _KEY.fullmatch(key) or not expires.isascii() or not expires.isdecimal() or len(expires) > 12:
            return None
        expected = self._signature(key, int(expires))
        if not hmac.compare_digest(signature.encode(), expected.encode()) or time.time() >= int(expires):
            return None
        try:
            return await asyncio.to_thread(self._path(key).read_bytes)
        except FileNotFoundError:
            return None

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    def _signature(self, key: str, expires: int) -> str:
        return hmac.new(self._secret, f"{key}.{expires}".encode(), hashlib.sha256).hexdigest()[:32]

    def _path(self, key: str) -> Path:
        return self.folder / (_checked(key) + _SUFFIX)

    async def _sweep_regularly(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self._seconds))
            async with self._writing:
                self._held_bytes = await asyncio.to_thread(self._sweep, 0)

    def _sweep(self, needed_bytes: int) -> int:
        """Deletes files that are too old, and the oldest until there is room; returns the bytes that are left."""
        found: list[tuple[float, int, str]] = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((_SUFFIX, _TEMPORARY_SUFFIX)) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, entry.path))
        held = sum(size for _, size, _ in found)
        too_old = time.time() - self._seconds
        for written_at, size, path in sorted(found):
            if written_at > too_old and held + needed_bytes <= self._maximum_bytes:
                break
            _remove(Path(path))
            held -= size
        return held


class S3ResultStore(ResultStore):
    """A bucket of an S3-compatible store. How long files stay is a rule of the bucket's life cycle.

    Args:
        client: boto3's S3 client.
        bucket: name of the bucket.
        prefix: begin of the names of objects.
    """

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix

    async def put(self, key: str, data: bytes, content_type: str) -> None:
        await self._call("put_object", Key=self._name(key), Body=data, ContentType=content_type)

    async def delete(self, key: str) -> None:
        await self._call("delete_object", Key=self._name(key))

    def url(self, key: str, base_url: str, seconds: float) -> str:
        parameters = {"Bucket": self._bucket, "Key": self._name(key)}
        link: str = self._client.generate_presigned_url(
            "get_object", Params=parameters, ExpiresIn=int(seconds)
        )
        return link

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    def _name(self, key: str) -> str:
        return self._prefix + _checked(key)

    async def _call(self, operation: str, **parameters: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            await asyncio.to_thread(getattr(self._client, operation), Bucket=self._bucket, **parameters)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            raise OSError(f"the bucket {self._bucket} refuses {operation}: {code}") from None
        except BotoCoreError as error:
            raise OSError(f"the bucket {self._bucket} cannot be reached: {type(error).__name__}") from None


def s3_store(bucket: str, prefix: str, endpoint: str, region: str) -> S3ResultStore:
    """Returns a store in a bucket; boto3 finds the credentials in its usual places.

    Args:
        bucket: name of the bucket.
        prefix: begin of the names of objects.
        endpoint: URL of a store other than AWS; empty for AWS.
        region: of the bucket; empty takes boto3's.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": 3},
        signature_version="s3v4",
    )
    client = boto3.client("s3", endpoint_url=endpoint or None, region_name=region or None, config=config)
    return S3ResultStore(client, bucket, prefix)


def new_key() -> str:
    """Returns a key that nobody can guess."""
    return secrets.token_hex(16)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of a result")
    return key


def _shared_secret(path: Path) -> bytes:
    """Returns the secret of a folder; the first gateway that uses the folder makes it."""
    if not path.exists():
        temporary = _temporary_file(path.parent, secrets.token_bytes(SECRET_BYTES))
        try:
            # A link appears whole or not at all, and never replaces another gateway's.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise OSError(f"{path} must have {SECRET_BYTES} bytes; delete it to get a new one")
    return secret


def _write(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    os.replace(_temporary_file(path.parent, data), path)


def _temporary_file(folder: Path, data: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(suffix=_TEMPORARY_SUFFIX, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _remove(path: Path) -> int:
    """Deletes a file and returns its bytes; 0 when there is none."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
