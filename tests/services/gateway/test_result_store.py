"""Result stores: links, their end, bounds, and an S3-compatible store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from moto.server import ThreadedMotoServer

from klein_services.gateway import operations
from klein_services.gateway.gateway import Gateway
from klein_services.gateway.result_store import LocalResultStore, new_key, s3_store
from klein_services.gateway.server import GatewayServer, running_gateway
from klein_services.gateway.settings import GatewaySettings

PNG = b"\x89PNG\r\n\x1a\n" + bytes(92)
"""100 bytes."""


def store(folder: Path, *, maximum_bytes: int = 1000, seconds: float = 600) -> LocalResultStore:
    return LocalResultStore(folder, maximum_bytes, seconds)


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.result")}


async def test_a_link_works_for_its_file_and_its_time_only(tmp_path: Path):
    settings = GatewaySettings(
        target="127.0.0.1:1",
        results_folder=str(tmp_path / "results"),
        host="127.0.0.1",
        port=0,
        metrics_port=0,
        drain_delay_seconds=0,
    )
    server = GatewayServer(settings, [operations.GROUP])
    async with server.running() as gateway:
        base = f"http://127.0.0.1:{server.port}"
        key = new_key()
        await gateway.results.put(key, PNG, "image/png")
        link = gateway.results.url(key, base, 60)
        async with httpx2.AsyncClient() as client:
            answer = await client.get(link)
            assert (answer.status_code, answer.content) == (200, PNG)
            assert answer.headers["content-type"] == "image/png"
            assert answer.headers["x-content-type-options"] == "nosniff"
            expires = link.partition("expires=")[2].partition("&")[0]
            signature = link.partition("signature=")[2]
            for wrong in (
                f"{base}/results/{key}",
                link.replace(expires, str(int(expires) + 1)),
                link[:-1] + ("0" if link[-1] != "0" else "1"),
                gateway.results.url(new_key(), base, 60),
                gateway.results.url(key, base, -1),
                f"{base}/results/..%2f.secret?expires={expires}&signature={signature}",
                f"{base}/results/{key}?expires=%D9%A1&signature={signature}",
                f"{base}/results/{key}?expires={expires}&signature=%FF",
            ):
                refused = await client.get(wrong)
                assert refused.status_code == 404, wrong
                assert "expired" in refused.json()["error"]["message"] or "no such path" in refused.text
            await gateway.results.delete(key)
            await gateway.results.delete(key)
            assert (await client.get(link)).status_code == 404


async def test_the_oldest_files_give_way_at_the_bound(tmp_path: Path):
    full = store(tmp_path, maximum_bytes=300)
    for number in range(3):
        await full.put(f"k{number}", PNG, "image/png")
        os.utime(tmp_path / f"k{number}.result", (number + 4e9, number + 4e9))
    # A file of the same key takes no further room.
    await full.put("k2", PNG, "image/png")
    assert files(tmp_path) == {"k0", "k1", "k2"}
    await full.put("k3", PNG, "image/png")
    assert len(files(tmp_path)) == 3
    assert "k3" in files(tmp_path)
    with pytest.raises(OSError, match="KLEIN_RESULTS_MIB"):
        await full.put("k4", bytes(301), "image/png")


async def test_files_that_are_too_old_are_deleted_and_no_others(tmp_path: Path):
    (tmp_path / "precious").write_bytes(b"not of the store")
    os.utime(tmp_path / "precious", (1, 1))
    first = store(tmp_path)
    await first.put("old", PNG, "image/png")
    os.utime(tmp_path / "old.result", (1, 1))
    await first.put("new", PNG, "image/png")
    again = store(tmp_path)
    assert files(tmp_path) == {"new"}
    assert (tmp_path / "precious").exists()
    # Gateways of one folder sign alike.
    assert (
        again.url("new", "", 60).partition("signature")[2]
        == first.url("new", "", 60).partition("signature")[2]
    )
    assert (tmp_path / ".secret").stat().st_mode & 0o777 == 0o600


async def test_files_are_deleted_while_the_store_runs(tmp_path: Path):
    running = store(tmp_path, seconds=0.2)
    running.start()
    await running.put("short", PNG, "image/png")
    async with asyncio.timeout(60):
        while files(tmp_path):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await running.close()


@pytest.mark.parametrize("key", ["", "../x", "a/b", "a.b", "ü", "a" * 101, ".secret"])
async def test_a_key_is_never_a_path(key: str, tmp_path: Path):
    with pytest.raises(ValueError, match="no key"):
        await store(tmp_path).put(key, PNG, "image/png")


async def test_a_folder_that_cannot_be_used_stops_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("")
    from klein_services.runtime.settings import SettingsError

    settings = GatewaySettings(results_folder=str(tmp_path / "file"))
    with pytest.raises(SettingsError, match="KLEIN_RESULTS_FOLDER"):
        async with running_gateway(settings):
            raise AssertionError("it started")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


async def test_a_bucket_keeps_files_and_signs_links(s3: str):
    bucket = s3_store("pictures", "klein/", s3, "us-east-1")
    with pytest.raises(OSError, match="NoSuchBucket"):
        await bucket.put("a-1", PNG, "image/png")
    await asyncio.to_thread(bucket._client.create_bucket, Bucket="pictures")
    await bucket.put("a-1", PNG, "image/png")
    link = bucket.url("a-1", "http://unused", 60)
    assert "/pictures/klein/a-1?" in link
    assert "X-Amz-Expires=60" in link
    async with httpx2.AsyncClient() as client:
        answer = await client.get(link)
        assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
        await bucket.delete("a-1")
        await bucket.delete("a-1")
        assert (await client.get(link)).status_code == 404
    await bucket.close()


async def test_a_bucket_that_does_not_answer_is_an_error_of_the_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bucket = s3_store("pictures", "", "http://127.0.0.1:1", "us-east-1")
    with pytest.raises(OSError, match="cannot be reached"):
        await bucket.put("a", PNG, "image/png")
    await bucket.close()


def test_the_gateway_opens_a_bucket_by_its_settings(s3: str):
    async def kind() -> str:
        settings = GatewaySettings(
            results_bucket="b", results_endpoint=s3, results_region="us-east-1", target="127.0.0.1:1"
        )
        from klein_services.gateway.gateway import open_gateway

        async with open_gateway(settings) as gateway:
            assert isinstance(gateway, Gateway)
            return type(gateway.results).__name__

    assert asyncio.run(kind()) == "S3ResultStore"
