"""A prompt to token ids: the checkpoint's own tokenizer and chat template, thinking off, padded on the right.

A prompt becomes one user message, unmodified, so special-token text in it (`<|im_end|>`) is parsed as special
tokens, as in diffusers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from klein_core.errors import CheckpointError, InvalidInput
from klein_core.params import DEFAULT_LIMITS, Limits, prompt_violations


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as the text encoder reads it."""

    token_ids: tuple[int, ...]
    """Exactly the sequence length; padding fills the end."""
    attention_mask: tuple[int, ...]
    """1 for each real token, 0 for each pad."""
    token_count: int
    """Real tokens, the template's included."""
    truncated: bool
    """Whether the prompt was longer than the sequence and lost its end."""


class PromptTokenizer:
    """Renders, tokenizes, cuts and pads. Safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._tokenizer = tokenizer
        self._pad_token_id = _pad_token_id(tokenizer)
        # The wrapper sets truncation and padding on its backend for every call, and threads would meet there:
        # "Already borrowed", or another call's length. A backend of its own that never changes has no such state.
        serialized = tokenizer.backend_tokenizer.to_str()
        self.digest = hashlib.blake2b(
            f"{serialized}{tokenizer.chat_template}".encode(), digest_size=16
        ).hexdigest()
        """Tells this vocabulary and chat template from others."""
        self._backend = tokenizers.Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path | str, sequence_length: int) -> PromptTokenizer:
        """Loads a `tokenizer/` folder; code in it is never run.

        Raises:
            CheckpointError: files are missing or malformed, or there is no chat template or pad token.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            made = cls(tokenizer, sequence_length)
            made._render("")
        # transformers and tokenizers raise plain Exception for some malformed files.
        except Exception as error:
            raise CheckpointError(f"{folder} is not a usable tokenizer: {error}") from error
        return made

    def tokenize(
        self, prompt: str, limits: Limits = DEFAULT_LIMITS, *, field: str = "prompt"
    ) -> TokenizedPrompt:
        """Returns the prompt's tokens inside the chat template.

        Args:
            prompt: the caller's text.
            limits: of its characters.
            field: the caller's name for it in errors.

        Raises:
            InvalidInput: the prompt is longer than the limit or is not text that can be encoded.
        """
        violations = list(prompt_violations(field, prompt, limits))
        if violations:
            raise InvalidInput(violations)
        ids = self._backend.encode(self._render(prompt)).ids
        kept = ids[: self.sequence_length]
        pad_count = self.sequence_length - len(kept)
        return TokenizedPrompt(
            token_ids=(*kept, *[self._pad_token_id] * pad_count),
            attention_mask=(*[1] * len(kept), *[0] * pad_count),
            token_count=len(kept),
            truncated=len(ids) > self.sequence_length,
        )

    def _render(self, prompt: str) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return str(text)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise CheckpointError("the tokenizer has no pad token")
    return int(tokenizer.pad_token_id)
