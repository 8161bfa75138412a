"""Example content policy: rules from a file and, if wanted, an image classifier whose weights are mounted.

    python policy_server.py --rules rules.toml [--host ::] [--port 50060]
        [--classifier FOLDER --deny LABEL [--threshold 0.5]]

Needs `klein-suite` for the protocol; the classifier needs its extra `stages`, too. The classifier's folder is one of
`transformers` for image classification, with its weights as safetensors. Nothing is ever downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import sys
import tomllib
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from klein_api.v1 import content_policy_service_pb2 as pb
from klein_api.v1.content_policy_service_pb2_grpc import (
    ContentPolicyServiceServicer,
    add_ContentPolicyServiceServicer_to_server,
)
from klein_api.v1.image_pb2 import IMAGE_FORMAT_RAW_RGB

SERVICE_NAME = "klein_api.v1.ContentPolicyService"
MESSAGE_BYTES = 300 << 20
"""Most bytes of a message; a request may bring several files."""
CALLS_AT_ONCE = 64
"""Calls that may be in progress; more are refused, so that memory is bounded."""
STOP_SECONDS = 10.0
ALLOW = pb.ContentDecision(verdict=pb.CONTENT_VERDICT_ALLOW)
_KEYS = ("words", "patterns", "file_digests", "maximum_file_bytes", "maximum_pixels")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("content_policy")


class RulesError(Exception):
    """The rules cannot be used; the text names the key."""


def denial(reason_code: str, reason: str) -> pb.ContentDecision:
    return pb.ContentDecision(verdict=pb.CONTENT_VERDICT_DENY, reason_code=reason_code, reason=reason)


def normalized(text: str) -> str:
    """Returns a text in one Unicode form, in lower case."""
    return unicodedata.normalize("NFKC", text).casefold()


@dataclass(frozen=True)
class Rules:
    """Rules of a TOML file."""

    words: tuple[re.Pattern[str], ...] = ()
    patterns: tuple[re.Pattern[str], ...] = ()
    file_digests: frozenset[bytes] = frozenset()
    maximum_file_bytes: int = 1 << 62
    maximum_pixels: int = 1 << 62

    @classmethod
    def read(cls, path: Path) -> Rules:
        """Reads a file of rules.

        Raises:
            RulesError: the file cannot be read, or a value cannot be used.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RulesError(f"{path} cannot be read: {error}") from None
        if unknown := sorted(values.keys() - set(_KEYS)):
            raise RulesError(f"{path} has the key {unknown[0]!r}; known are {', '.join(_KEYS)}")
        for key in ("words", "patterns", "file_digests"):
            if not all(isinstance(each, str) and each for each in values.get(key, [])):
                raise RulesError(f"{key} must be a list of texts that are not empty")
        for key in ("maximum_file_bytes", "maximum_pixels"):
            if not isinstance(values.get(key, 1), int) or values.get(key, 1) < 1:
                raise RulesError(f"{key} is {values[key]!r}; it must be a whole number of at least 1")
        digests = [digest.lower() for digest in values.get("file_digests", [])]
        if bad := [digest for digest in digests if not _SHA256.fullmatch(digest)]:
            raise RulesError(f"file_digests has {bad[0]!r}; it must be 64 hexadecimal digits")
        try:
            patterns = tuple(re.compile(each) for each in values.get("patterns", []))
        except re.error as error:
            raise RulesError(f"patterns has {error.pattern!r}: {error}") from None
        words = (r"\s+".join(map(re.escape, normalized(word).split())) for word in values.get("words", []))
        return cls(
            words=tuple(re.compile(rf"(?<!\w){word}(?!\w)") for word in words),
            patterns=patterns,
            file_digests=frozenset(map(bytes.fromhex, digests)),
            **{key: values[key] for key in ("maximum_file_bytes", "maximum_pixels") if key in values},
        )

    def check_request(self, request: pb.CheckRequestRequest) -> pb.ContentDecision:
        text = normalized(request.prompt)
        if any(word.search(text) for word in self.words):
            return denial("DENIED_WORD", "the prompt contains a word that is not allowed")
        if any(pattern.search(text) for pattern in self.patterns):
            return denial("DENIED_PATTERN", "the prompt asks for something that is not allowed")
        for image in request.input_images:
            if image.sha256 in self.file_digests:
                return denial("DENIED_FILE", f"{image.field} may not be used")
            if image.size_bytes > self.maximum_file_bytes:
                reason = f"{image.field} has {image.size_bytes} bytes; at most {self.maximum_file_bytes} are allowed"
                return denial("FILE_TOO_LARGE", reason)
        return ALLOW

    def check_image(self, request: pb.CheckImageRequest) -> pb.ContentDecision:
        if request.width_px * request.height_px > self.maximum_pixels:
            return denial("IMAGE_TOO_LARGE", f"the image has more than {self.maximum_pixels} pixels")
        return ALLOW


class Classifier:
    """An image classifier in a local folder.

    Args:
        folder: of `transformers`, for image classification.
        label: the label whose images are denied.
        threshold: the least score at which they are.

    Raises:
        RulesError: the classifier has no such label.
    """

    def __init__(self, folder: Path, label: str, threshold: float) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        ).eval()
        labels = self._model.config.label2id
        if label not in labels:
            raise RulesError(f"the classifier has no label {label!r}; it has {', '.join(labels)}")
        self._index, self._threshold = labels[label], threshold

    def check_image(self, request: pb.CheckImageRequest) -> pb.ContentDecision:
        import torch
        from PIL import Image

        if request.format == IMAGE_FORMAT_RAW_RGB:
            image = Image.frombytes("RGB", (request.width_px, request.height_px), request.data)
        else:
            image = Image.open(BytesIO(request.data), formats=("PNG", "JPEG", "WEBP")).convert("RGB")
        with torch.inference_mode():
            scores = self._model(**self._processor(image, return_tensors="pt")).logits.softmax(-1)[0]
        if float(scores[self._index]) >= self._threshold:
            return denial("CLASSIFIED", "the image shows something that is not allowed")
        return ALLOW


class PolicyServicer(ContentPolicyServiceServicer):
    """Decides by rules first, then by the classifier, if there is one."""

    def __init__(self, rules: Rules, classifier: Classifier | None) -> None:
        self._rules = rules
        self._classifier = classifier
        # One thread: the event loop answers health checks while an image is classified.
        self._executor = ThreadPoolExecutor(1)

    async def CheckRequest(self, request: pb.CheckRequestRequest, context: Any) -> pb.CheckRequestResponse:
        decision = await self._run(self._rules.check_request, request)
        return pb.CheckRequestResponse(decision=decision)

    async def CheckImage(self, request: pb.CheckImageRequest, context: Any) -> pb.CheckImageResponse:
        decision = self._rules.check_image(request)
        if decision == ALLOW and self._classifier is not None:
            decision = await self._run(self._classifier.check_image, request)
        return pb.CheckImageResponse(decision=decision)

    async def _run(self, check: Any, request: Any) -> pb.ContentDecision:
        decision: pb.ContentDecision = await asyncio.get_running_loop().run_in_executor(
            self._executor, check, request
        )
        if decision != ALLOW:
            _log.info("request %s is denied: %s", request.request_id, decision.reason_code)
        return decision


async def serve(servicer: PolicyServicer, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT; writes the address to standard output once it takes calls."""
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES)], maximum_concurrent_rpcs=CALLS_AT_ONCE
    )
    add_ContentPolicyServiceServicer_to_server(servicer, server)
    states = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    await states.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    sys.stdout.write(f"listening on {host} port {bound}\n")
    sys.stdout.flush()
    await stopped.wait()
    await states.enter_graceful_shutdown()
    await server.stop(STOP_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rules", type=Path, required=True)
    parser.add_argument("--host", default="::")
    parser.add_argument("--port", type=int, default=50060)
    parser.add_argument("--classifier", type=Path, help="folder of the classifier")
    parser.add_argument("--deny", help="label whose images are denied")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a denied image, 0 to 1")
    options = parser.parse_args(arguments)
    if (options.classifier is None) != (options.deny is None):
        parser.error("--classifier and --deny need each other")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        rules = Rules.read(options.rules)
        classifier = (
            Classifier(options.classifier, options.deny, options.threshold) if options.classifier else None
        )
    except (RulesError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    asyncio.run(serve(PolicyServicer(rules, classifier), options.host, options.port))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
