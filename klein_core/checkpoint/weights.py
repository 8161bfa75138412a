"""Streams safetensors into a module built on the `meta` device, strictly in both directions.

Nothing is read before every name, shape and dtype has been compared, and a tensor that is not needed is never
read. See `klein_core.checkpoint` for the files, the layouts of names and the reading.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from klein_core.checkpoint.files import Checkpoint, open_checkpoint
from klein_core.checkpoint.key_mapping import NO_SOURCES, KeyMap, Layout, TensorSlice, match_tensors
from klein_core.checkpoint.reader import DTYPES, Reader
from klein_core.errors import listed, raise_if_problems
from klein_core.quantization import quantized_weight
from klein_core.quantization.quantized_weight import QuantizedWeight, share_buffer

PLAIN_DTYPES = ("F32", "F16", "BF16")
"""Dtypes of weights that are numbers as they stand."""


class QuantizedWeights(Protocol):
    """Takes over the parameters that a checkpoint stores in another form than as plain numbers.

    The loader asks it for each parameter before anything is read. Pieces name the stored tensors `X.weight` and
    the rows of them that make the parameter; `sources.companions_of` names what else is stored about each, of
    which a fused projection has one set for all its rows.
    """

    def is_companion(self, name: str) -> bool:
        """Whether a stored tensor only describes another one, so that it is no extra."""

    def describes(self, name: str) -> bool:
        """Whether a stored tensor has another form than plain numbers, which was checked with the form."""

    def shape(self, name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Returns the shape of the numbers that a stored tensor stands for, which may be packed."""

    def takes(self, parameter: str, pieces: tuple[TensorSlice, ...], checkpoint: Checkpoint) -> bool:
        """Whether it reads this parameter. Raises CheckpointError for a form that it cannot read."""

    def needs(self, pieces: tuple[TensorSlice, ...], checkpoint: Checkpoint) -> Collection[str]:
        """Names every stored tensor that it will read for a parameter; headers only."""

    def load(
        self, shape: torch.Size, pieces: tuple[TensorSlice, ...], reader: Reader, dtype: torch.dtype
    ) -> QuantizedWeight | Tensor:
        """Reads a parameter of this shape; returns what stands in the network in its place.

        dtype: what the network computes in.
        """


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint | Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    sources: KeyMap = NO_SOURCES,
    layout: Layout | None = None,
    ignorable: Callable[[str], bool] = lambda name: False,
    quantized: QuantizedWeights | None = None,
) -> None:
    """Gives every parameter and persistent buffer of `module` its value from the checkpoint.

    Args:
        module: built on `meta`; non-persistent buffers are its own affair and must be real already.
        checkpoint: one component's tensors, or the folder or file that holds them.
        device: where the tensors go, one at a time.
        dtype: of every tensor; `None` is the checkpoint's own (that of most of its plain values).
        sources: for parameters whose name in the checkpoint differs or that several pieces make; a checkpoint
            that has the whole under the parameter's own name loads as well.
        layout: how the checkpoint prefixes its names, if it does.
        ignorable: tells checkpoint names that are not needed. They are not read, their shards may be absent,
            and a buffer of that name is zero.
        quantized: takes over what is not stored as plain numbers; without it such a checkpoint is refused.

    Raises:
        CheckpointError: names are missing, extra, half of a fused group, of another shape or dtype, or a file
            is corrupt. The message lists the names and the file. The module is as it was.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    targets = module.state_dict()
    is_companion = quantized.is_companion if quantized else lambda name: False
    match = match_tensors(targets, checkpoint, sources, layout, ignorable, is_companion)
    match.raise_if_problems(checkpoint.place)
    plan = match.plan
    taken = {name for name in plan if quantized and quantized.takes(name, plan[name], checkpoint)}
    plain = {name: pieces for name, pieces in plan.items() if name not in taken}
    _check_shapes(plan, targets, _shapes(plan, checkpoint, quantized), checkpoint.place)
    _check_dtypes(plan, checkpoint, quantized)
    dtype = dtype or commonest_dtype(plan, checkpoint)
    needed = {piece.name for pieces in plan.values() for piece in pieces}
    needed |= {
        name for parameter in taken if quantized for name in quantized.needs(plan[parameter], checkpoint)
    }
    with Reader(checkpoint, needed, device) as reader:
        loaded = {name: _assembled(plain[name], targets[name].shape, reader, dtype) for name in plain}
        read = {
            name: quantized.load(targets[name].shape, plan[name], reader, dtype)
            for name in taken
            if quantized is not None
        }
    loaded |= {name: value for name, value in read.items() if isinstance(value, Tensor)}
    stored = {name: value for name, value in read.items() if not isinstance(value, Tensor)}
    for name in targets.keys() - plan.keys():
        loaded[name] = torch.zeros(targets[name].shape, dtype=targets[name].dtype, device=device)
    _put(module, loaded, stored)


def commonest_dtype(plan: KeyMap, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype that most of the plain values of `plan` are stored in; bfloat16 if there are none."""
    counts: Counter[str] = Counter()
    for name in {piece.name for pieces in plan.values() for piece in pieces}:
        entry = checkpoint.entry(name)
        counts[entry.dtype] += entry.element_count if entry.dtype in PLAIN_DTYPES else 0
    commonest, count = counts.most_common(1)[0]
    return DTYPES[commonest] if count else torch.bfloat16


def _assembled(
    pieces: tuple[TensorSlice, ...], shape: torch.Size, reader: Reader, dtype: torch.dtype
) -> Tensor:
    """Reads pieces, one below the other, into one new tensor."""
    target = torch.empty(shape, dtype=dtype, device=reader.device)
    if not shape:
        reader.copy(pieces[0], target)
        return target
    row = 0
    for piece in pieces:
        row_count = len(piece.row_range(reader.checkpoint.entry(piece.name).shape[0]))
        reader.copy(piece, target[row : row + row_count])
        row += row_count
    return target


def _put(module: nn.Module, loaded: Mapping[str, Tensor], stored: Mapping[str, QuantizedWeight]) -> None:
    """Puts everything in its place; only now does the module change."""
    for name, weight in stored.items():
        quantized_weight.place(module, name, weight)
    left = module.load_state_dict(loaded, strict=False, assign=True)
    inner = {f"{name}.{buffer}" for name, weight in stored.items() for buffer in weight.state_dict()}
    if left.unexpected_keys or set(left.missing_keys) - inner:
        raise RuntimeError(f"not put in their place: {listed(left.unexpected_keys + left.missing_keys)}")
    on_meta = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if on_meta:
        raise RuntimeError(f"non-persistent tensors must be real before loading: {listed(on_meta)}")
    share_buffer(module)


def _shapes(
    plan: KeyMap, checkpoint: Checkpoint, quantized: QuantizedWeights | None
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the numbers of each stored tensor that the plan needs."""
    names = {piece.name for pieces in plan.values() for piece in pieces}
    return {
        name: quantized.shape(name, checkpoint) if quantized else checkpoint.entry(name).shape
        for name in names
    }


def _check_dtypes(plan: KeyMap, checkpoint: Checkpoint, quantized: QuantizedWeights | None) -> None:
    """Also of what is plain in the file and only quantized on its way in."""
    names = {piece.name for pieces in plan.values() for piece in pieces}
    plain = {name for name in names if not (quantized and quantized.describes(name))}
    kinds = {name: checkpoint.entry(name).dtype for name in plain}
    foreign = {f"{name} ({kind})" for name, kind in kinds.items() if kind not in PLAIN_DTYPES}
    raise_if_problems(checkpoint.place, [(f"not one of {', '.join(PLAIN_DTYPES)}:", foreign)])


def _check_shapes(
    plan: KeyMap, targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], place: Path
) -> None:
    wrong = _half_used(plan, shapes)
    for target, pieces in plan.items():
        expected = tuple(targets[target].shape)
        if not _fits(pieces, expected, shapes):
            found = ", ".join(f"{piece.name} {shapes[piece.name]}" for piece in pieces)
            wrong.append(f"{found} instead of {expected}")
    raise_if_problems(place, [("of another shape than the configuration says:", wrong)])


def _half_used(plan: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns what is wrong with stored tensors that have rows that no piece takes."""
    taken: Counter[str] = Counter()
    for piece in (piece for pieces in plan.values() for piece in pieces):
        shape = shapes[piece.name]
        taken[piece.name] += len(piece.row_range(shape[0])) if shape else 1
    return [
        f"{name} {shapes[name]} instead of {count} rows"
        for name, count in taken.items()
        if shapes[name] and shapes[name][0] != count
    ]


def _fits(
    pieces: tuple[TensorSlice, ...], expected: tuple[int, ...], stored: Mapping[str, tuple[int, ...]]
) -> bool:
    shapes = [_shape(piece, stored[piece.name]) for piece in pieces]
    if len(shapes) == 1 or not all(shapes):
        return shapes == [expected]
    rows = sum(shape[0] for shape in shapes)
    return (rows, *expected[1:]) == expected and all(shape[1:] == expected[1:] for shape in shapes)


def _shape(piece: TensorSlice, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a piece's shape as its parameter has it."""
    if piece.is_pointwise and len(stored) == 4 and stored[2:] == (1, 1):
        stored = stored[:2]
    whole = piece.start == 0 and piece.stop is None
    return stored if whole or not stored else (len(piece.row_range(stored[0])), *stored[1:])


SAMPLES = 1024
"""Elements of each tensor that count, give or take; training of any kind changes more than the rest."""
_GOLDEN = 2654435769
"""2³² / φ: multiples of it, modulo 2³², are spread evenly whatever their number (Knuth, vol. 3, 6.4)."""


def weights_digest(module: nn.Module, *others: str) -> str:
    """Returns 32 hexadecimal digits that depend on every tensor's name, type, shape and samples of its values.

    Equal on every device and in every process that holds the same weights in the same precision, so that replicas
    agree. Samples are spread evenly over rows and columns: a model of gigabytes takes a fraction of a second.

    Args:
        module: a loaded model; what it keeps quantized counts as it is stored.
        others: what else decides the model's answers, for example its tokenizer.
    """
    digest = hashlib.blake2b(digest_size=16)
    for other in others:
        digest.update(f"{len(other)} {other}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_sampled(tensor))
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    picked = flat[_sampled_places(flat.numel()).to(flat.device)].cpu()
    return bytes(picked.view(torch.uint8).numpy())


def _sampled_places(count: int) -> Tensor:
    """Returns one place in each of about `SAMPLES` equal parts of a tensor, never the same place in two of them.

    A fixed stride would see few columns: in klein's shapes it is a multiple of the row's length.
    """
    stride = max(1, count // SAMPLES)
    parts = torch.arange(-(-count // stride))
    within = (parts * _GOLDEN % (1 << 32)) * stride >> 32
    return (parts * stride + within).clamp(max=count - 1)
