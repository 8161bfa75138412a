"""Errors of the hub and of the disk as a sentence and a hint."""

from __future__ import annotations

import errno

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from klein_services.cli.errors import CliError
from klein_services.cli.hub.client import Hub

AGAIN = "Whole files are kept: to go on, run the same command again."
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXPLAINED = (HfHubHTTPError, httpx2.HTTPError, HFValidationError, OSError)
"""Exceptions that `explain` turns into sentences; any other is a bug of this program."""


def explain(error: Exception, hub: Hub, repository: str) -> CliError:
    """Turns a failed call to the hub, or a failed write, into a sentence and a hint for the user."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # huggingface_hub wraps a failed request when the file is not on disk either.
        error = error.__cause__
    match error:
        case GatedRepoError():
            return _gated(hub, repository)
        case RepositoryNotFoundError():
            return CliError(
                f"{repository} does not exist at {hub.endpoint}, or is private.",
                "Check its name; for a private one set HF_TOKEN to a token that may read it.",
            )
        case HFValidationError():
            return CliError(f"{repository!r} is not a repository's name.", "Write OWNER/REPOSITORY.")
        case OfflineModeIsEnabled():
            return CliError("HF_HUB_OFFLINE is set, so nothing is downloaded.", "Unset it and try again.")
        case HfHubHTTPError():
            return _refused(error, hub, repository)
        case httpx2.HTTPError():
            return CliError(
                f"{hub.endpoint} cannot be reached: {_reason(error)}.",
                f"Check the network, HTTPS_PROXY and HF_ENDPOINT. {AGAIN}",
            )
        case OSError() if error.errno in NO_ROOM:
            return CliError(
                f"No space is left where the model is written: {error.strerror}.",
                f"Make room, or name another place with --to. {AGAIN}",
            )
        case OSError() if error.errno is not None:
            path = f": {error.filename}" if error.filename else ""
            return CliError(f"The model cannot be written: {error.strerror}{path}.")
        case _:
            return CliError(f"A file of {repository} did not arrive whole: {_reason(error)}.", AGAIN)


def _gated(hub: Hub, repository: str) -> CliError:
    if hub.has_token:
        return CliError(
            f"Your token may not read {repository}, which is gated.",
            f"Accept its license at {hub.page(repository)} with the token's account; a fine-grained token "
            "must also allow reading gated repositories.",
        )
    return CliError(
        f"{repository} is gated: it needs an account that accepted its license.",
        f"Accept it at {hub.page(repository)}, make a token there, and set HF_TOKEN to it (or run "
        "`hf auth login`).",
    )


def _refused(error: HfHubHTTPError, hub: Hub, repository: str) -> CliError:
    status = error.response.status_code
    if status == httpx2.codes.UNAUTHORIZED:
        return CliError(f"{hub.endpoint} does not accept your token.", "Check HF_TOKEN, or unset it.")
    if status == httpx2.codes.FORBIDDEN:
        return CliError(f"You may not read {repository}.", "Check what the token in HF_TOKEN allows.")
    if status == httpx2.codes.TOO_MANY_REQUESTS:
        return CliError(f"{hub.endpoint} accepts no more requests for now.", f"Wait a while. {AGAIN}")
    return CliError(f"{hub.endpoint} answered {status} for {repository}.", f"Try again later. {AGAIN}")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
