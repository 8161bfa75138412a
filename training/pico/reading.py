"""Pre-training of pico's text encoder: linear read-outs predict what a prompt describes.

The read-outs see the last tokens of the chat template, which follow every prompt. The flow transformer then finds
the answers there. The read-outs themselves are not part of the model.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3Model

from klein_core.text_encoder.encoder import tapped_embedding
from klein_core.text_encoder.tokenizer import PromptTokenizer, TokenizedPrompt
from training.pico.checkpoints import load_state, report, save_state
from training.pico.muon import Muon
from training.pico.tasks import (
    EDIT_KINDS,
    READING,
    TWO_REFERENCE_KINDS,
    Task,
    edit,
    is_trainable,
    text_to_image,
    two_references,
)
from training.pico.tokenizer import VOCABULARY_SIZE

TAPPED_LAYERS = (2, 3, 4)
SEQUENCE_LENGTH = 64
HIDDEN_SIZE = 128
_LEARNING_RATE = 4e-3
_BATCH = 128
# Tokens before the end of the template: <|im_end|>, assistant, <think>, </think>.
_PLACES = {
    9: ("kind", "top", "bottom"),
    6: tuple(name for name in READING if name.startswith("first")),
    4: tuple(name for name in READING if name.startswith("second")),
    2: tuple(READING),
}


def configuration() -> Qwen3Config:
    """Qwen3's shape in small; the last layer is never tapped, as in klein."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=max(TAPPED_LAYERS) + 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        attention_bias=False,
    )


def build_encoder() -> Qwen3Model:
    """Makes the encoder up to its last tapped layer, with weights to begin from."""
    cut = configuration()
    cut.num_hidden_layers = max(TAPPED_LAYERS)
    if cut.layer_types is not None:
        cut.layer_types = cut.layer_types[: max(TAPPED_LAYERS)]
    model = Qwen3Model(cut)
    model.set_submodule("norm", nn.Identity())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
    return model


class ReadOuts(nn.Module):
    """One linear classifier for each question and each template token that answers it."""

    def __init__(self) -> None:
        super().__init__()
        width = HIDDEN_SIZE * len(TAPPED_LAYERS)
        self.classifiers = nn.ModuleDict({
            f"{place} {name}": nn.Linear(width, len(READING[name]))
            for place, names in _PLACES.items()
            for name in names
        })  # fmt: skip

    def forward(self, embedding: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Returns the scores of each answer for prompts (B, S, C) of `lengths` (B,) real tokens."""
        rows = torch.arange(embedding.shape[0])
        scores = {}
        for key, classifier in self.classifiers.items():
            place = int(key.split(" ", 1)[0])
            scores[key] = classifier(embedding[rows, lengths - place])
        return scores


def any_task(rng: random.Random) -> Task:
    """Draws a trainable task of any kind."""
    while True:
        draw = rng.random()
        if draw < 0.55:
            task = text_to_image(rng)
        elif draw < 0.82:
            task = edit(rng.choice(EDIT_KINDS), rng)
        else:
            task = two_references(rng.choice(TWO_REFERENCE_KINDS), rng)
        if is_trainable(task):
            return task


def padded(prompts: Sequence[TokenizedPrompt], length: int) -> tuple[Tensor, Tensor]:
    """Cuts the padding of prompts to a common length: ids and mask, each (B, length)."""
    ids = torch.tensor([prompt.token_ids[:length] for prompt in prompts])
    mask = torch.tensor([prompt.attention_mask[:length] for prompt in prompts])
    return ids, mask


def answers(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Returns the number of the right answer to each question, (B,) each."""
    return {
        name: torch.tensor([values.index(task.reading.get(name, values[0])) for task in tasks])
        for name, values in READING.items()
    }


def examined(
    read_outs: ReadOuts, embedding: Tensor, lengths: Tensor, tasks: Sequence[Task]
) -> tuple[Tensor, float]:
    """Runs the read-outs on embeddings (B, S, C) of prompts with `lengths` (B,) real tokens.

    Returns:
        The loss, and the share of prompts whose every answer at `</think>` is right.
    """
    scores, right = read_outs(embedding, lengths), answers(tasks)
    losses = [functional.cross_entropy(score, right[key.split(" ", 1)[1]]) for key, score in scores.items()]
    hits = torch.stack([scores[f"2 {name}"].argmax(1) == right[name] for name in READING]).all(0)
    return torch.stack(losses).sum(), float(hits.float().mean())


def buckets(
    rng: random.Random, tokenizer: PromptTokenizer, count: int
) -> Iterator[list[tuple[Task, TokenizedPrompt]]]:
    """Yields batches of tasks without end; prompts of one batch are about equally long, which saves padding."""
    while True:
        tasks = [any_task(rng) for _ in range(4 * count)]
        pairs = [(task, tokenizer.tokenize(task.prompt)) for task in tasks]
        pairs.sort(key=lambda pair: pair[1].token_count)
        batches = [pairs[first : first + count] for first in range(0, len(pairs), count)]
        rng.shuffle(batches)
        yield from batches


def read(
    model: Qwen3Model, read_outs: ReadOuts, batch: Sequence[tuple[Task, TokenizedPrompt]]
) -> tuple[Tensor, float]:
    """Encodes one batch and examines it; see `examined`."""
    prompts = [prompt for _, prompt in batch]
    lengths = torch.tensor([prompt.token_count for prompt in prompts])
    ids, mask = padded(prompts, int(lengths.max()))
    embedding = tapped_embedding(model, ids, mask, TAPPED_LAYERS)
    return examined(read_outs, embedding, lengths, [task for task, _ in batch])


@dataclass(frozen=True)
class ReadingConfig:
    """Training time, and the paths of tokenizer and state."""

    tokenizer: Path
    state: Path
    seconds: float
    report_every: int = 50


def train(config: ReadingConfig) -> Qwen3Model:
    """Trains for the configured time, resuming from the saved state; returns the encoder."""
    torch.manual_seed(2)
    rng = random.Random(2)
    tokenizer = PromptTokenizer.from_folder(config.tokenizer, SEQUENCE_LENGTH)
    model, read_outs = build_encoder(), ReadOuts()
    both = optimizers(model, read_outs)
    step, elapsed = 0, 0.0
    if state := load_state(config.state):
        model.load_state_dict(state["encoder"])
        read_outs.load_state_dict(state["read_outs"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed = int(state["step"]), float(state["elapsed"])
    rng.seed(2 + step)
    batches = buckets(rng, tokenizer, _BATCH)
    started, hits = time.monotonic() - elapsed, 0.0
    while elapsed < config.seconds:
        remaining = 1 - elapsed / config.seconds
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1, (step + 1) / 50, 0.02 + 1.4 * remaining)
        loss, share = read(model, read_outs, next(batches))
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimizer in both:
            optimizer.step()
        step, elapsed, hits = step + 1, time.monotonic() - started, hits + share
        if step % config.report_every == 0:
            report(
                f"reading step {step}  {elapsed:.0f}/{config.seconds:.0f} s  loss {loss:.3f}  "
                f"all right {hits / config.report_every:.3f}",
            )
            hits = 0.0
            _save(config.state, model, read_outs, both, step, elapsed)
    _save(config.state, model, read_outs, both, step, elapsed)
    return model


def optimizers(model: Qwen3Model, read_outs: ReadOuts) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and read-outs."""
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if p.ndim == 2 and "embed_tokens" not in n]
    rest = [p for n, p in named.items() if p.ndim != 2 or "embed_tokens" in n]
    adam = torch.optim.AdamW(
        [*rest, *read_outs.parameters()], lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    return [Muon(hidden, _LEARNING_RATE), adam]


def _save(
    path: Path,
    model: Qwen3Model,
    read_outs: ReadOuts,
    both: list[torch.optim.Optimizer],
    step: int,
    elapsed: float,
) -> None:
    save_state(
        path,
        {
            "encoder": model.state_dict(),
            "read_outs": read_outs.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in both],
            "step": step,
            "elapsed": elapsed,
        },
    )
