"""Training of pico from scratch: `python -m training.pico.train`.

Stages: tokenizer, autoencoder, reading, flow, decoder, export. The state folder holds each stage's state: a run
resumes where it stopped, and a finished stage is not repeated.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path

import torch
import torch.distributed as distributed
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn

from klein_core.pico import WEIGHTS
from klein_core.text_encoder.tokenizer import PromptTokenizer
from klein_core.vae_decoder.autoencoder import Autoencoder
from training.pico import flow_training, reading, vae_training
from training.pico.batches import Supply
from training.pico.checkpoints import load_state
from training.pico.decoder_training import refine_decoder
from training.pico.export import export
from training.pico.tokenizer import save_tokenizer, train_tokenizer


def main() -> None:
    arguments = _arguments()
    folder: Path = arguments.state
    torch.set_num_threads(1)
    tokenizer_folder = folder / "tokenizer"
    if not tokenizer_folder.exists():
        tokenizer: Tokenizer = train_tokenizer()
        save_tokenizer(tokenizer, tokenizer_folder)
    vae_training.train(vae_training.VaeTrainingConfig(folder / "vae.ckpt", 60 * arguments.vae_minutes))
    reading.train(
        reading.ReadingConfig(tokenizer_folder, folder / "reading.ckpt", 60 * arguments.reading_minutes)
    )
    _train_flow(folder, 60 * arguments.flow_minutes, arguments.processes)
    refine_decoder(folder / "vae.ckpt", folder / "decoder.ckpt", 60 * arguments.decoder_minutes)
    export_state(folder, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.pico.train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--state", type=Path, default=Path(".training"), help="folder of the training state")
    parser.add_argument(
        "--output",
        type=Path,
        default=WEIGHTS,
        help="folder of the finished checkpoint; what is there is replaced, by default the package's own weights",
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    for stage, minutes in (("vae", 20), ("reading", 12), ("flow", 200), ("decoder", 15)):
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help="time for this stage")
    return parser.parse_args()


def load_autoencoder(state: Path) -> Autoencoder:
    """Returns the autoencoder of a training state, ready for use."""
    autoencoder = Autoencoder(vae_training.CONFIG)
    saved = load_state(state)
    if saved is None:
        raise FileNotFoundError(f"{state} is missing: the autoencoder was not trained yet")
    autoencoder.load_state_dict(saved["autoencoder"])
    return autoencoder.eval().requires_grad_(False)


def build_model(folder: Path) -> flow_training.Model:
    """Returns a new flow transformer with the pre-trained text encoder."""
    state = load_state(folder / "reading.ckpt")
    if state is None:
        raise FileNotFoundError(f"{folder / 'reading.ckpt'} is missing: the text encoder was not trained yet")
    torch.manual_seed(4)
    encoder, read_outs = reading.build_encoder(), reading.ReadOuts()
    encoder.load_state_dict(state["encoder"])
    read_outs.load_state_dict(state["read_outs"])
    return flow_training.Model(encoder, read_outs)


def _train_flow(folder: Path, seconds: float, processes: int) -> None:
    if processes == 1:
        _flow_worker(0, folder, seconds, 1, "")
        return
    with tempfile.TemporaryDirectory() as meeting:
        spawn(  # type: ignore[no-untyped-call]
            _flow_worker, (folder, seconds, processes, f"{meeting}/point"), nprocs=processes
        )


def _flow_worker(rank: int, folder: Path, seconds: float, processes: int, meeting: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
        )
    model = build_model(folder)
    tokenizer = PromptTokenizer.from_folder(folder / "tokenizer", reading.SEQUENCE_LENGTH)
    config = flow_training.FlowTrainingConfig(folder / "flow.ckpt", seconds, rank, processes)
    training_state = load_state(config.state)
    seed = 17 * rank + (int(training_state["step"]) if training_state else 0)
    supply = Supply(load_autoencoder(folder / "vae.ckpt"), tokenizer, random.Random(seed))
    flow_training.Training(config, model, supply).run()


def export_state(folder: Path, output: Path) -> None:
    """Writes the averaged weights of a training state as a checkpoint."""
    model = build_model(folder)
    state = load_state(folder / "flow.ckpt")
    if state is None:
        raise FileNotFoundError(
            f"{folder / 'flow.ckpt'} is missing: the flow transformer was not trained yet"
        )
    model.load_state_dict(state["average"])
    decoder = folder / "decoder.ckpt"
    autoencoder = load_autoencoder(decoder if decoder.exists() else folder / "vae.ckpt")
    export(output, folder / "tokenizer", model.encoder, model.transformer, autoencoder)


if __name__ == "__main__":
    main()
