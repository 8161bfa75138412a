"""`klein token new`, and how the commands that call an orchestrator send a token."""

import asyncio
import threading

import pytest

from klein_services.cli.main import main
from klein_services.orchestrator.tokens import parse_tokens, read_tokens, token_hash
from tests.services.fakes.orchestrator_suite import FakeSuite


@pytest.fixture
def klein(capfd, monkeypatch):
    monkeypatch.delenv("KLEIN_TOKEN", raising=False)

    def run(*arguments):
        try:
            exit_code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            exit_code = int(end.code or 0)
        printed = capfd.readouterr()
        return exit_code, printed.out, " ".join(printed.err.split())

    return run


@pytest.fixture
def target(tmp_path, klein):
    """A real orchestrator with tokens before fake stages, in a thread of its own."""
    path = tmp_path / "tokens.toml"
    assert klein("token", "new", "first", "--file", path)[0] == 0
    suite, begun, ended = FakeSuite(settings={"tokens_file": str(path)}), threading.Event(), []

    async def serve():
        async with suite.running():
            stop = asyncio.Event()
            ended.append((asyncio.get_running_loop(), stop))
            begun.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert begun.wait(60)
    yield suite.address
    loop, stop = ended[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def test_a_new_token_is_printed_once_with_its_table(klein):
    exit_code, out, err = klein(
        "token", "new", "acme", "--weight", 2, "--requests-in-flight", 3, "--megapixels-per-minute", 4.5,
        "--model", "klein 4b", "--model", "pico",
    )  # fmt: skip
    assert exit_code == 0
    token, empty, *table = out.splitlines()
    assert empty == ""
    tenant = parse_tokens("\n".join(table).encode(), "printed").tenant_of(token)
    assert (tenant.name, tenant.weight, tenant.requests_in_flight) == ("acme", 2.0, 3)
    assert (tenant.megapixels_per_minute, tenant.models) == (4.5, ("klein 4b", "pico"))
    assert token not in err
    assert token not in "\n".join(table)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["bad name"], "a name must be 1 to 64 letters"),
        (["klein_abc"], "must not begin with klein_"),
        (["acme", "--weight", 0], "weight must be a number in [0.01, 1000]"),
        (["acme", "--requests-in-flight", 0], "requests_in_flight must be"),
        (["acme", "--megapixels-per-minute", "nan"], "megapixels_per_minute must be"),
        (["acme", "--model", ""], "models must be a list"),
    ],
)
def test_values_that_the_orchestrator_would_refuse_are_refused(klein, arguments, problem):
    exit_code, out, err = klein("token", "new", *arguments)
    assert (exit_code, out) == (2, "")
    assert problem in err


def test_a_table_is_added_to_a_file_which_keeps_its_mode_and_is_never_half_written(klein, tmp_path):
    path = tmp_path / "tokens.toml"
    first = klein("token", "new", "first", "--file", path)[1].strip()
    path.chmod(0o600)
    second = klein("token", "new", "second", "--file", path)[1].strip()
    assert path.stat().st_mode & 0o777 == 0o600
    tokens = read_tokens(path)
    assert (tokens.tenant_of(first).name, tokens.tenant_of(second).name) == ("first", "second")
    before = path.read_text()
    exit_code, out, err = klein("token", "new", "first", "--file", path)
    assert (exit_code, out) == (2, "")
    assert "has a table of first already" in err
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["tokens.toml"]
    path.write_text("[broken")
    exit_code, out, err = klein("token", "new", "third", "--file", path)
    assert (exit_code, out, path.read_text()) == (2, "", "[broken")
    exit_code, out, err = klein("token", "new", "third", "--file", tmp_path / "none" / "tokens.toml")
    assert (exit_code, out) == (2, "")
    assert "cannot be written: No such file or directory" in err


def test_calls_send_the_token_of_the_file_or_the_environment(klein, target, tmp_path, monkeypatch):
    other = klein("token", "new", "other")[1].split()[0]
    secret = tmp_path / "secret"
    secret.write_text(f"{other}\n")
    exit_code, out, err = klein("status", "--target", target)
    assert (exit_code, out) == (2, "")
    assert "needs a valid token" in err
    assert "Set KLEIN_TOKEN, or name a file with --token-file." in err
    assert klein("status", "--target", target, "--token-file", secret)[0] == 2
    good = klein("token", "new", "good", "--file", tmp_path / "tokens.toml")[1].strip()
    secret.write_text(f"{good}\n")
    deadline = threading.Event()
    for _ in range(100):
        exit_code, out, err = klein("status", "--target", target, "--token-file", secret)
        if exit_code == 0:
            break
        deadline.wait(0.1)
    assert exit_code == 0
    monkeypatch.setenv("KLEIN_TOKEN", good)
    assert klein("status", "--target", target)[0] == 0
    assert klein("adapters", "--target", target)[0] == 0
    image = tmp_path / "star.png"
    assert klein("generate", "a star", "--target", target, "-o", image)[0] == 0
    assert image.exists()
    # The file wins over the environment.
    secret.write_text(other)
    assert klein("status", "--target", target, "--token-file", secret)[0] == 2


@pytest.mark.parametrize("token", ["two words", "é", "line\nbreak", "x" * 5000])
def test_what_cannot_be_a_token_is_not_sent_and_not_shown(klein, tmp_path, token):
    secret = tmp_path / "secret"
    secret.write_text(token)
    exit_code, out, err = klein("status", "--token-file", secret)
    assert (exit_code, out) == (2, "")
    assert "The token has characters that no token has, or too many." in err
    assert token not in err


@pytest.mark.parametrize(("content", "problem"), [("", "is empty"), (None, "cannot be read")])
def test_a_token_file_without_a_token_is_named(klein, tmp_path, content, problem):
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_text(content)
    exit_code, _, err = klein("generate", "a star", "--token-file", secret)
    assert exit_code == 2
    assert f"--token-file {secret} {problem}" in err


def test_no_flag_takes_a_token_itself(klein, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    for command in ("generate", "status", "adapters"):
        printed = klein(command, "--help")[1]
        assert "--token-file" in printed
        assert "--token " not in printed


def test_the_hash_of_a_token_is_sha256():
    assert token_hash("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
