"""Errors of the command line: one sentence, a hint, an exit code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from rich.console import Console
from rich.text import Text

from klein_services.cli.exit_codes import FAILED, INTERRUPTED, MISUSED
from klein_services.runtime.status import (
    CONTENT_DENIED,
    CONTENT_POLICY_FAILED,
    UNKNOWN_ADAPTER,
)

if TYPE_CHECKING:
    from klein_client import KleinError, Violation
    from klein_services.cli.target import Target

_FLAGS = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative-prompt",
    "references": "--reference",
    "width_px": "--size",
    "height_px": "--size",
    "step_count": "--steps",
    "guidance_scale": "--guidance",
    "seed": "--seed",
    "image_count": "--count",
    "format": "--format",
    "quality": "--quality",
    "model": "--model",
    "adapters": "--adapter",
    "embed_prompt": "--embed-prompt",
    "initial_image": "--initial",
    "mask": "--mask",
    "mask_is_alpha": "--mask-alpha",
    "strength": "--strength",
    "mask_padding_px": "--mask-padding",
    "expand": "--expand",
    "preserve_unmasked": "--no-preserve",
}
_REFERENCE = re.compile(r"references\[(\d{1,3})\]")
_AREA = "times height_px "
"""Begin of a description of `width_px` that is about the area; on the command line both sides are one flag."""
_BOTH_SIDES = "and height_px "
"""Begin of a description of `width_px` that is about both sides."""
_INITIAL_IMAGE = re.compile(r"\b(an|the) initial_image\b")


@dataclass
class CliError(Exception):
    """Failure that ends the command with one sentence, a hint and an exit code."""

    sentence: str
    hint: str = ""
    exit_code: int = FAILED

    def __str__(self) -> str:
        return f"{self.sentence} {self.hint}".strip()

    def show(self, console: Console) -> None:
        console.print(Text.assemble(("Error: ", "bold red"), self.sentence), soft_wrap=True)
        if self.hint:
            console.print(Text.assemble(("Hint: ", "bold"), self.hint), soft_wrap=True)


def call_error(error: KleinError, target: Target | str, reference_names: Sequence[str] = ()) -> CliError:
    """Returns a failed call's status as a sentence with a hint about what to do.

    Args:
        error: the failed call.
        target: the orchestrator that was called.
        reference_names: files of the request's references, to be named in place of their index.
    """
    match error.code:
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(error, target)
        case grpc.StatusCode.INVALID_ARGUMENT:
            violations = [_named(violation, reference_names) for violation in error.violations]
            if not violations:
                return CliError(_sentence(error), exit_code=MISUSED)
            if len(violations) == 1:
                return CliError(with_period(violations[0]), exit_code=MISUSED)
            listed = "\n  ".join([f"{len(violations)} values cannot be used:", *violations])
            return CliError(listed, exit_code=MISUSED)
        case grpc.StatusCode.NOT_FOUND:
            descriptions = "; ".join(violation.description for violation in error.violations)
            sentence = with_period(descriptions) if descriptions else _sentence(error)
            command, what = ("adapters",) * 2 if error.reason == UNKNOWN_ADAPTER else ("status", "models")
            return CliError(sentence, f"`klein {command} --target {target}` lists the {what}.", MISUSED)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _exhausted(error)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return CliError(
                "The request took longer than --timeout allows.",
                "Allow more with --timeout, or request less.",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return CliError(
                f"What listens at {target} is not a klein orchestrator.",
                "Check --target and the server's version.",
            )
        case grpc.StatusCode.UNAUTHENTICATED:
            return CliError(_sentence(error), "Set KLEIN_TOKEN, or name a file with --token-file.", MISUSED)
        case grpc.StatusCode.PERMISSION_DENIED:
            if error.reason == CONTENT_DENIED:
                return CliError(_sentence(error), "Ask for something else.")
            return CliError(_sentence(error), "Ask the server's operator for access.")
        case grpc.StatusCode.CANCELLED:
            return CliError("The call was cancelled.", exit_code=INTERRUPTED)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return CliError(_sentence(error), "The server's operator can correct it.")
        case code:
            return CliError(f"{_sentence(error)} ({code.name})", "The server's log shows the cause.")


def _unavailable(error: KleinError, target: Target | str) -> CliError:
    # Imported here: both modules import this one.
    from klein_services.cli.handshake import handshake_error
    from klein_services.cli.target import Target

    if error.reason == CONTENT_POLICY_FAILED:
        return CliError(_sentence(error), "The server's operator can repair the policy.")
    if error.reason:
        return CliError(
            _sentence(error), f"`klein status --target {target}` shows the stages; try again soon."
        )
    called = Target(target) if isinstance(target, str) else target
    if explained := handshake_error(error.message, called):
        return explained
    return CliError(
        f"Nothing answers at {target}.",
        "Start the suite with `klein up`, or name another server with --target.",
    )


def _exhausted(error: KleinError) -> CliError:
    if error.retry_after_seconds:
        return CliError(_sentence(error), f"Try again in {error.retry_after_seconds:.0f} s.")
    if error.reason == "QUOTA_EXCEEDED":
        hint = "Ask for fewer or smaller images, or the server's operator for a larger quota."
        return CliError(_sentence(error), hint)
    if "larger than max" in error.message:
        return CliError(
            "The image files are larger than the server takes.", "Make the files smaller.", MISUSED
        )
    return CliError(_sentence(error), "Try again later, or allow more time with --timeout.")


def _named(violation: Violation, reference_names: Sequence[str]) -> str:
    """Returns a violation with the flag of its field, and the file if it is about a reference."""
    field = violation.field.removeprefix("spec.")
    description = _INITIAL_IMAGE.sub("--initial", violation.description)
    for begin in (_AREA, _BOTH_SIDES):
        if description.startswith(begin):
            return "--size " + description.removeprefix(begin)
    reference = _REFERENCE.fullmatch(field)
    if reference and int(reference[1]) < len(reference_names):
        return f"--reference {reference_names[int(reference[1])]} ({field}) {description}"
    name, bracket, index = field.partition("[")
    flag = _FLAGS.get(name, name)
    field_note = "" if flag.lower().lstrip("-").replace("-", "_") == name else f" ({field})"
    return f"{flag}{bracket}{index}{field_note} {description}"


def _sentence(error: KleinError) -> str:
    return with_period(error.message or error.code.name.replace("_", " ").lower())


def with_period(text: str) -> str:
    """Returns text as a sentence: a capital letter first, one punctuation mark last."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
