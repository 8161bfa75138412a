"""Encoded training batches, each used several times with fresh noise because encoding images is slow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from klein_core.text_encoder.tokenizer import PromptTokenizer, TokenizedPrompt
from klein_core.vae_decoder.autoencoder import Autoencoder
from training.pico.mixture import Setting, any_setting, any_training_task
from training.pico.tasks import Task
from training.pico.vae_training import pixels
from training.pico.world import TOKEN_PX, Scene, coverage, render

_PENDING = 384
_ITEM_WEIGHT = 3.0
Pair = tuple[Task, TokenizedPrompt]


@dataclass(frozen=True)
class Batch:
    """Tasks of one family at one setting, ready for the transformer."""

    family: str
    setting: Setting
    tasks: tuple[Task, ...]
    prompts: tuple[TokenizedPrompt, ...]
    targets: Tensor
    """(B, rows, columns, channels)."""
    references: tuple[Tensor, ...]
    """(B, rows_i, columns_i, channels) each."""
    weights: Tensor
    """(B, rows, columns): tokens with something drawn in them count more; 1 on average."""


@torch.no_grad()
def encoded(autoencoder: Autoencoder, scenes: Sequence[Scene], width_px: int, height_px: int) -> Tensor:
    """Renders and encodes scenes to normalized latents (B, rows, columns, channels)."""
    images = pixels([render(scene, width_px, height_px) for scene in scenes])
    return autoencoder.encode(images).permute(0, 2, 3, 1).contiguous()


def token_weights(tasks: Sequence[Task], width_px: int, height_px: int) -> Tensor:
    """Returns the weight of each token of each target, (B, rows, columns).

    What was in the first reference counts as much as what shall be there: it is wrong to leave it.
    """
    rows, columns = height_px // TOKEN_PX, width_px // TOKEN_PX
    weights = np.ones((len(tasks), rows, columns), np.float32)
    for weight, task in zip(weights, tasks, strict=True):
        touched = np.zeros((rows, columns), np.bool_)
        for item in {item for scene in (task.target, *task.references[:1]) for item in scene.items}:
            covered = coverage(item, width_px, height_px).reshape(rows, TOKEN_PX, columns, TOKEN_PX)
            touched |= covered.max((1, 3)) > 0
        weight += _ITEM_WEIGHT * touched
    return torch.from_numpy(weights / weights.mean())


class Supply:
    """Makes batches and hands each out several times.

    Args:
        autoencoder: encodes pictures; must be finished.
        tokenizer: tokenizes prompts.
        rng: decides everything.
        kept: batches of each family that are in use at a time.
        uses: how often one batch is handed out.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        tokenizer: PromptTokenizer,
        rng: random.Random,
        kept: int = 16,
        uses: int = 4,
    ) -> None:
        self._autoencoder, self._tokenizer, self._rng = autoencoder, tokenizer, rng
        self._kept, self._uses = kept, uses
        self._pending: dict[str, list[Pair]] = {}
        self._shelf: dict[str, list[tuple[Batch, int]]] = {}

    def draw(self, family: str, progress: float, tokens: int) -> Batch:
        """Returns a batch of about `tokens` tokens for this moment of training (0…1)."""
        shelf = self._shelf.setdefault(family, [])
        if len(shelf) < self._kept:
            shelf.append((self._make(family, any_setting(family, progress, self._rng), tokens), self._uses))
            chosen = len(shelf) - 1
        else:
            chosen = self._rng.randrange(len(shelf))
        batch, left = shelf.pop(chosen)
        if left > 1:
            shelf.append((batch, left - 1))
        return batch

    def _make(self, family: str, setting: Setting, tokens: int) -> Batch:
        count = max(2, round(tokens / (setting.image_tokens + 30)))
        pairs = self._take(family, count)
        tasks = tuple(task for task, _ in pairs)
        targets = [task.target for task in tasks]
        return Batch(
            family,
            setting,
            tasks,
            tuple(prompt for _, prompt in pairs),
            encoded(self._autoencoder, targets, *setting.target),
            tuple(
                encoded(self._autoencoder, [task.references[i] for task in tasks], *size)
                for i, size in enumerate(setting.references)
            ),
            token_weights(tasks, *setting.target),
        )

    def _take(self, family: str, count: int) -> list[Pair]:
        """Takes tasks whose prompts are about equally long, which saves padding."""
        pending = self._pending.setdefault(family, [])
        if len(pending) < max(count, _PENDING // 2):
            while len(pending) < max(count, _PENDING):
                task = any_training_task(family, self._rng)
                pending.append((task, self._tokenizer.tokenize(task.prompt)))
            pending.sort(key=lambda pair: pair[1].token_count)
        first = self._rng.randint(0, len(pending) - count)
        taken = pending[first : first + count]
        del pending[first : first + count]
        return taken
