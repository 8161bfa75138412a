"""The example content policy as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "content_policy"


@asynccontextmanager
async def example(tmp_path, rules: str, *arguments: str):
    """Runs the server as a process and yields its address."""
    (tmp_path / "rules.toml").write_text(rules)
    command = [str(FOLDER / "policy_server.py"), "--rules", str(tmp_path / "rules.toml")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
        yield f"127.0.0.1:{line.split()[-1]}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def failed_start(tmp_path, rules: str, *arguments: str) -> str:
    (tmp_path / "rules.toml").write_text(rules)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(FOLDER / "policy_server.py"),
        *("--rules", str(tmp_path / "rules.toml"), "--port", "0", *arguments),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 2
    return errors.decode()
