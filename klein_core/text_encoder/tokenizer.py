"""Tokenizer: prompts to token ids, with the checkpoint's tokenizer and chat template, padded on the right.

A prompt becomes one user message, unmodified and with thinking disabled. Special-token text in it (`<|im_end|>`) is
parsed as special tokens, as in diffusers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from klein_core.checkpoint.config_keys import TOKENIZER
from klein_core.errors import CheckpointError, InvalidInput
from klein_core.params import DEFAULT_LIMITS, Limits, prompt_violations


class PromptTokenizer:
    """Renders the chat template, tokenizes, truncates and pads. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        for key, supported in TOKENIZER.fixed.items():
            if getattr(tokenizer, key) != supported:
                raise CheckpointError(
                    f"{key} is {getattr(tokenizer, key)!r}; only {supported!r} is supported"
                )
        self.sequence_length = sequence_length
        self._tokenizer = tokenizer
        if tokenizer.pad_token_id is None:
            raise CheckpointError("the tokenizer has no pad token")
        self._pad_token_id = int(tokenizer.pad_token_id)
        # The wrapper sets truncation and padding on its backend in every call, so concurrent calls fail with "Already
        # borrowed" or use another call's length. A separate backend that is never changed has no such state.
        serialized = tokenizer.backend_tokenizer.to_str()
        self.digest = hashlib.blake2b(
            f"{serialized}{tokenizer.chat_template}".encode(), digest_size=16
        ).hexdigest()
        """Identifies the vocabulary and the chat template."""
        self._backend = tokenizers.Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def from_folder(cls, folder: Path | str, sequence_length: int) -> PromptTokenizer:
        """Loads a `tokenizer/` folder; never runs code from it.

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
            loaded = cls(tokenizer, sequence_length)
            loaded._render("")
        # transformers and tokenizers raise plain Exception for some malformed files.
        except Exception as error:
            raise CheckpointError(f"{folder} is not a usable tokenizer: {error}") from error
        return loaded

    def tokenize(
        self, prompt: str, limits: Limits = DEFAULT_LIMITS, *, field: str = "prompt"
    ) -> TokenizedPrompt:
        """Returns the tokens of the prompt in the chat template.

        Args:
            prompt: the client's text.
            limits: bound its number of characters.
            field: the prompt's name in errors.

        Raises:
            InvalidInput: the prompt is longer than the limit, or cannot be encoded as UTF-8.
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


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as input of the text encoder."""

    token_ids: tuple[int, ...]
    """As many as the sequence length, padding at the end."""
    attention_mask: tuple[int, ...]
    """1 for each token, 0 for padding."""
    token_count: int
    """Tokens without padding, the template's included."""
    truncated: bool
    """Whether the prompt was longer than the sequence and was cut."""
