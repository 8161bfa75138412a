"""Savings of the reference cache: a step with a cache against a standard editing step, and a hit against a miss.

All contenders run on the same random weights, in turns in one run. A miss computes the cache and then all steps, a hit
the steps alone, and standard editing carries the references' tokens through every step. Before timing, a
hit must have the bits of a miss, and the steps of both models must be finite and different.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import Bar, alternate, command, describe_machine, finish, paired_ratio
from benchmarks.random_modules import Place, StepInputs, flow_transformer
from benchmarks.shapes import SHAPES
from klein_core.denoiser.packing import Span
from klein_core.denoiser.reference_cache import ReferenceCache, bytes_per_token
from klein_core.denoiser.sampler import Trajectory, packed_step
from klein_core.denoiser.transformer import FlowTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP_COUNT = 4
STEP_BAR, HIT_BAR = 1.3, 1.1
SIGMA = 0.9


def main() -> int:
    """Runs the selected measurements; returns the exit code."""
    options = _options()
    torch.manual_seed(0)
    print(f"{command()}\n{describe_machine('torch')}")
    if options.device != "cpu":
        print(torch.cuda.get_device_name())
    place = Place(options.device, DTYPES[options.dtype])
    transformer = flow_transformer(SHAPES[options.variant], place)
    size = bytes_per_token(transformer.config, place.dtype)
    print(f"a cached reference token takes {size / 1024:.0f} KiB")
    bars = []
    with torch.no_grad():
        for count in options.references:
            inputs = StepInputs.draw(SHAPES[options.variant], place, options.size, count)
            bars += Comparison(transformer, inputs, options.device).bars(options.repeats)
    return finish(bars, options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(SHAPES), default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--size", type=int, default=512, help="width and height of all images in pixels")
    parser.add_argument("--references", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    return parser.parse_args()


@dataclass(frozen=True)
class Comparison:
    """One image with some references, edited in both ways."""

    transformer: FlowTransformer
    inputs: StepInputs
    device: str

    def bars(self, repeats: int) -> list[Bar]:
        """Times steps and whole requests, in turns."""
        count, side = len(self.references), self.inputs.images[0].shape[0] * 16
        name = f"{side}², {count} reference{'s' * (count > 1)}"
        cache = self._cache()
        self._require_sound(cache)
        steps = self._timed(
            {"standard": self._standard_step, "cached": lambda: self._cached_step(cache)}, repeats
        )
        requests = self._timed(
            {
                "standard": lambda: self._request(None),
                "miss": lambda: self._request(self._cache()),
                "hit": lambda: self._request(cache),
            },
            repeats,
        )
        for part, seconds in (("step", steps), (f"request of {STEP_COUNT} steps", requests)):
            told = ", ".join(f"{side} {min(values):.3f} s" for side, values in seconds.items())
            print(f"{name}, {part}: {told}", flush=True)
        return [
            _bar(f"{name}: a cached step against a standard one", steps, "standard", "cached", STEP_BAR),
            _bar(f"{name}: a miss against standard editing", requests, "standard", "miss", 1.0),
            _bar(f"{name}: a hit against a miss", requests, "miss", "hit", HIT_BAR),
        ]

    @property
    def references(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs.images[1:])

    def _cache(self) -> ReferenceCache:
        return self.transformer.reference_cache(self.references)

    def _standard_step(self) -> Tensor:
        return self.transformer([self._span()])[0]

    def _cached_step(self, cache: ReferenceCache) -> Tensor:
        return self.transformer([replace(self._span(), references=(), reference_cache=cache)])[0]

    def _span(self) -> Span:
        return Span(self.inputs.prompt, self.inputs.images[0], self.references, SIGMA)

    def _request(self, cache: ReferenceCache | None) -> Tensor:
        trajectory = Trajectory(
            latents=self.inputs.images[0],
            step_count=STEP_COUNT,
            prompt_embedding=self.inputs.prompt,
            references=() if cache else self.references,
            reference_cache=cache,
        )
        while not trajectory.finished:
            packed_step(self.transformer, [trajectory])
        return trajectory.latents

    def _require_sound(self, cache: ReferenceCache) -> None:
        """Raises SystemExit if a result is not finite, or if a hit and a miss differ."""
        cached, standard = self._cached_step(cache), self._standard_step()
        is_finite = bool(cached.isfinite().all() and standard.isfinite().all())
        is_same_model = torch.equal(cached, standard)
        if not is_finite or is_same_model or not torch.equal(self._cached_step(self._cache()), cached):
            raise SystemExit("a cached step is not what it should be; nothing was timed")

    def _timed(self, runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
        def synchronized(run: Callable[[], Tensor]) -> Callable[[], None]:
            def timed() -> None:
                run()
                if self.device != "cpu":
                    torch.cuda.synchronize()

            return timed

        return alternate({name: synchronized(run) for name, run in runs.items()}, repeats)


def _bar(name: str, seconds: dict[str, list[float]], baseline: str, candidate: str, limit: float) -> Bar:
    ratio = paired_ratio(seconds[baseline], seconds[candidate])
    return Bar(f"{name}: times as fast", ratio, limit, at_most=False)


if __name__ == "__main__":
    sys.exit(main())
