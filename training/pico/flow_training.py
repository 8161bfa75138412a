"""Joint training of pico's flow transformer and text encoder.

The world is deterministic, so the velocity is a function of prompt and references even at full noise, and four
steps are enough. Most of the practice is therefore at the noise levels of the four-step schedule.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from transformers import Qwen3Model

from klein_core.denoiser.packing import Span
from klein_core.denoiser.sampler import sigmas as schedule_sigmas
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.text_encoder.encoder import tapped_embedding
from klein_core.variants import TransformerConfig
from training.pico.batches import Batch, Supply
from training.pico.checkpoints import load_state, report, save_state
from training.pico.mixture import family_shares, text_length
from training.pico.muon import Muon
from training.pico.reading import HIDDEN_SIZE, SEQUENCE_LENGTH, TAPPED_LAYERS, ReadOuts, examined, padded

CONFIG = TransformerConfig(
    num_layers=2,
    num_single_layers=4,
    num_attention_heads=6,
    attention_head_dim=32,
    joint_attention_dim=HIDDEN_SIZE * len(TAPPED_LAYERS),
    in_channels=128,
    mlp_ratio=3.0,
    axes_dims_rope=(8, 8, 8, 8),
)
STEP_COUNT = 4
_LEARNING_RATE = 2e-3
_RATE_SHARES = ((2.25, 0.25), (1.0, 0.25))
"""Learning rates of Muon and of AdamW, each for the transformer and for the text encoder, as shares of the whole."""
_READING_WEIGHT = 0.05
_ENCODER_RESTS_AT = 0.65
"""From this moment (0…1) on the text encoder stays as it is, which saves time."""
_TOKENS_PER_STEP = 3600
_WARM_UP_STEPS = 30


class Model(nn.Module):
    """The trained parts: transformer, text encoder, and the read-outs that keep the encoder legible."""

    def __init__(self, encoder: Qwen3Model, read_outs: ReadOuts) -> None:
        super().__init__()
        self.transformer = FlowTransformer(CONFIG)
        self.encoder = encoder
        self.read_outs = read_outs
        initialize(self.transformer)


@torch.no_grad()
def initialize(transformer: FlowTransformer) -> None:
    """Starts as a network that returns its own input: at full noise that is the velocity but for the picture."""
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or "norm_out" in name:
            parameter.normal_(std=0.02)
        elif parameter.ndim == 2:
            parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
    embedder, head = transformer.x_embedder.weight, transformer.proj_out.weight
    nn.init.orthogonal_(embedder)
    head.copy_(embedder.T * (embedder.shape[1] / embedder.shape[0]) ** 0.5)


def optimizers(model: Model, workers: tuple[int, int] = (0, 1)) -> list[torch.optim.Optimizer]:
    """Muon for matrices between hidden activations; AdamW for what meets inputs, outputs, noise levels and norms."""
    apart = ("embed", "proj_out", "modulation", "norm_out", "x_embedder", "time_guidance", "read_outs")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and not any(word in name for word in apart)
        groups.setdefault((is_hidden, name.startswith("encoder.")), []).append(parameter)
    blocks = projection_rows(model.transformer)
    muon = Muon(
        groups[True, False], _LEARNING_RATE, blocks=blocks, workers=workers, add_up=distributed.all_reduce
    )
    muon.add_param_group({"params": groups[True, True]})
    adam = torch.optim.AdamW(groups[False, False], lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    adam.add_param_group({"params": groups[False, True]})
    return [muon, adam]


def projection_rows(transformer: FlowTransformer) -> dict[nn.Parameter, list[int]]:
    """Returns the row counts of the projections inside each fused weight."""
    hidden, inner = CONFIG.hidden_size, int(CONFIG.hidden_size * CONFIG.mlp_ratio)
    rows = {}
    for name, parameter in transformer.named_parameters():
        if "to_qkv_mlp_proj" in name:
            rows[parameter] = [hidden] * 3 + [inner] * 2
        elif "qkv" in name:
            rows[parameter] = [hidden] * 3
        elif "linear_in" in name:
            rows[parameter] = [inner] * 2
    return rows


def noise_levels(count: int, target_tokens: int) -> Tensor:
    """Draws σ: 40 % pure noise, 35 % the schedule's other nodes, 25 % spread over all levels."""
    nodes = torch.tensor(list(schedule_sigmas(target_tokens, STEP_COUNT)), dtype=torch.float32)[:STEP_COUNT]
    draw = torch.rand(count)
    node = nodes[1 + torch.randint(STEP_COUNT - 1, (count,))]
    shift, uniform = torch.exp(2 * torch.rand(count)), torch.rand(count)
    spread = shift * uniform / (1 + (shift - 1) * uniform)
    return torch.where(draw < 0.4, torch.ones(count), torch.where(draw < 0.75, node, spread))


def embedded(model: Model, batch: Batch, length: int) -> Tensor:
    """Encodes the prompts of a batch, padded to `length`: (B, length, joint attention channels)."""
    ids, mask = padded(batch.prompts, length)
    return tapped_embedding(model.encoder, ids, mask, TAPPED_LAYERS)


def reading_loss(model: Model, batch: Batch, embedding: Tensor) -> tuple[Tensor, float]:
    """Returns the loss of the read-outs, and the share of prompts that are read right."""
    lengths = torch.tensor([prompt.token_count for prompt in batch.prompts])
    return examined(model.read_outs, embedding, lengths, batch.tasks)


def velocity_loss(model: Model, batch: Batch, embedding: Tensor) -> Tensor:
    """Returns the mean squared velocity error at random noise levels, weighted by token."""
    noise = torch.randn_like(batch.targets)
    sigma = noise_levels(len(batch.tasks), batch.targets.shape[1] * batch.targets.shape[2])
    level = sigma[:, None, None, None]
    noisy = batch.targets + level * (noise - batch.targets)
    spans = [
        Span(embedding[i], noisy[i], tuple(reference[i] for reference in batch.references), float(sigma[i]))
        for i in range(len(batch.tasks))
    ]
    velocity = torch.stack(model.transformer(spans))
    error = (velocity - (noise - batch.targets)).square().mean(-1)
    return (error * batch.weights).mean()


class Average:
    """An exponential moving average of parameters over about a tenth of all steps so far."""

    def __init__(self, model: Model) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.steps = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        self.steps += 1
        rate = 1 - min(0.997, 1 - 1 / (self.steps / 8 + 2))
        for kept, new in zip(self.model.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, rate)


@dataclass(frozen=True)
class FlowTrainingConfig:
    """Training time, path of the state, and the rank of this process."""

    state: Path
    seconds: float
    rank: int = 0
    processes: int = 1
    report_every: int = 20
    save_every_seconds: float = 60.0


def learning_rate(progress: float, step: int) -> float:
    """Warms up, holds for half the time, then falls in a straight line to 3 %."""
    falling = 1.0 if progress < 0.5 else max(0.03, 2 * (1 - progress))
    return _LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP_STEPS) * falling


class Training:
    """A run that can stop and go on at any step."""

    def __init__(self, config: FlowTrainingConfig, model: Model, supply: Supply) -> None:
        self.config, self.model, self.supply = config, model, supply
        self.optimizers = optimizers(model, (config.rank, config.processes))
        self.average = Average(model)
        self.step, self.elapsed = 0, 0.0
        self._sums: dict[str, list[float]] = {}
        self._resume()
        self._rng = random.Random(1000 * config.rank + self.step)
        torch.manual_seed(1000 * config.rank + self.step)

    @property
    def progress(self) -> float:
        return self.elapsed / self.config.seconds

    def run(self) -> None:
        """Trains until the configured time is over."""
        started = saved = time.monotonic() - self.elapsed
        while self.progress < 1:
            self._one_step()
            self.elapsed = self._agreed(time.monotonic() - started)
            if self.config.rank == 0 and self.step % self.config.report_every == 0:
                self._report()
            if self.config.rank == 0 and time.monotonic() - saved > self.config.save_every_seconds:
                self.save()
                saved = time.monotonic()
        if self.config.rank == 0:
            self.save()

    def _one_step(self) -> None:
        rate = learning_rate(self.progress, self.step)
        for optimizer, shares in zip(self.optimizers, _RATE_SHARES, strict=True):
            optimizer.zero_grad()
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
        for family, share in family_shares(self.progress).items():
            batch = self.supply.draw(family, self.progress, round(share * _TOKENS_PER_STEP))
            longest = max(prompt.token_count for prompt in batch.prompts)
            length = text_length(longest, SEQUENCE_LENGTH, self.progress, self._rng)
            with torch.set_grad_enabled(self.progress < _ENCODER_RESTS_AT):
                embedding = embedded(self.model, batch, length)
            loss = velocity = velocity_loss(self.model, batch, embedding)
            if embedding.requires_grad:
                reading, right = reading_loss(self.model, batch, embedding)
                loss = velocity + _READING_WEIGHT * reading
                self._note("reading", right)
            (share * loss).backward()  # type: ignore[no-untyped-call]
            self._note(_label(batch), velocity.item())
        self._share_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(self.model)
        self.step += 1

    def _share_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.config.processes == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.config.processes
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _agreed(self, seconds: float) -> float:
        if self.config.processes == 1:
            return seconds
        clock = torch.tensor([seconds], dtype=torch.float64)
        distributed.broadcast(clock, 0)
        return float(clock)

    def _note(self, name: str, value: float) -> None:
        total = self._sums.setdefault(name, [0.0, 0.0])
        total[0] += value
        total[1] += 1

    def _report(self) -> None:
        means = "  ".join(
            f"{name} {total / count:.4f}" for name, (total, count) in sorted(self._sums.items())
        )
        report(f"flow step {self.step}  {self.elapsed:.0f}/{self.config.seconds:.0f} s  {means}")
        self._sums.clear()

    def save(self) -> None:
        """Writes everything that `_resume` needs; the random stream starts anew after a resume."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "average_steps": self.average.steps,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        save_state(self.config.state, state)

    def _resume(self) -> None:
        state = load_state(self.config.state)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.average.steps = int(state["average_steps"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])


def _label(batch: Batch) -> str:
    width, height = batch.setting.target
    size = str(width) if width == height and width in (64, 128) else "other"
    return f"{batch.family} {size}"
