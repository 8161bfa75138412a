"""Peak memory of loading each part of a model, relative to the bytes of its weights.

    python -m benchmarks.load_memory [--check] [--shape klein-4b] [--folder FOLDER]

Each part of a random checkpoint in bf16 (klein-4B's is 16 GB, written to a folder that is removed at the end unless
`--folder` names one) is loaded in a fresh process on the CPU. The peak is that of the whole process minus what it held
before the load: Python, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from benchmarks.full_size_cpu import checkpoint
from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.peak_memory import held_bytes, highest_bytes, reset_highest
from benchmarks.shapes import SHAPES

BAR = 1.15
PARTS = ("text-encoder", "transformer", "vae")


def main() -> int:
    """Runs what the command line asks for."""
    options = _options()
    if options.part:
        print(json.dumps(loaded_alone(options.folder, options.part)))
        return 0
    print(f"$ {command()}\n{describe_machine('torch', 'transformers', 'safetensors')}", flush=True)
    with checkpoint(options) as folder:
        return finish([_bar(folder, part) for part in PARTS], options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="klein-4b")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written and kept")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _bar(folder: Path, part: str) -> Bar:
    line = [sys.executable, "-m", "benchmarks.load_memory", "--folder", str(folder), "--part", part]
    answer = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    peak, weights = json.loads(answer.stdout.splitlines()[-1])
    print(f"{part}: {weights / 1e9:.2f} GB of weights, {peak / 1e9:.2f} GB at the peak", flush=True)
    return Bar(f"{part}: peak of loading over the weights' bytes", peak / weights, BAR)


def loaded_alone(folder: Path, part: str) -> tuple[int, int]:
    """Loads one part into this process; returns the peak and the weights' bytes."""
    load = _loader(part)
    before = held_bytes("cpu")
    reset_highest("cpu")
    module = load(folder)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return highest_bytes("cpu") - before, weights


def _loader(part: str) -> Callable[[Path], nn.Module]:
    """Imports what a part needs and returns its loader, so that imports do not count as loading."""
    from klein_core.denoiser.transformer import FlowTransformer
    from klein_core.text_encoder.encoder import TextEncoder
    from klein_core.vae_decoder.decoder import VaeDecoder

    def text_encoder(folder: Path) -> nn.Module:
        return TextEncoder.from_folder(folder).model

    def vae(folder: Path) -> nn.Module:
        return VaeDecoder.from_folder(folder).autoencoder

    loaders: dict[str, Callable[[Path], nn.Module]] = {
        "text-encoder": text_encoder,
        "transformer": FlowTransformer.from_folder,
        "vae": vae,
    }
    return loaders[part]


if __name__ == "__main__":
    sys.exit(main())
