"""Streams safetensors into a module built on the `meta` device, strictly in both directions.

A component's folder holds one `*.safetensors` file, or shards and their `*.safetensors.index.json`. Nothing
is read before every name and shape has been compared, and a tensor that is not needed is never read. Pickle
is not a format of this library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from klein_core.errors import CheckpointError
from klein_core.variants import read_json

Rename = Mapping[str, tuple[str, ...]]
"""Parameter name → the checkpoint's names for it; several are concatenated along the first axis."""

_INDEX_SUFFIX = ".safetensors.index.json"
_DEFAULT_STEMS = ("diffusion_pytorch_model", "model")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NO_RENAMES: Rename = MappingProxyType({})
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor of one component lies."""

    folder: Path
    files: Mapping[str, Path]
    """Tensor name → the safetensors file that holds it."""


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Finds the component's tensors without reading any.

    Raises:
        CheckpointError: no safetensors, two sets of them, only pickle files, or a corrupt header or index.
    """
    folder = Path(folder)
    source = _weight_source(folder)
    if source.name.endswith(_INDEX_SUFFIX):
        return Checkpoint(folder, _read_index(source))
    with _open(source) as handle:
        return Checkpoint(folder, dict.fromkeys(handle.keys(), source))


def load_weights(
    module: nn.Module,
    folder: Path | str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    rename: Rename = _NO_RENAMES,
    ignorable: Callable[[str], bool] = lambda name: False,
) -> None:
    """Gives every parameter and persistent buffer of `module` its value from the checkpoint.

    Args:
        module: built on `meta`; non-persistent buffers are its own affair and must be real already.
        folder: one component's folder.
        device: where the tensors go, one at a time.
        dtype: of every tensor; `None` is the checkpoint's own (that of most of its values).
        rename: for parameters whose name in the checkpoint differs or that fuse several tensors; a
            checkpoint that already has the fused tensor under the parameter's name loads as well.
        ignorable: tells checkpoint names that are not needed. They are not read, their shards may be absent,
            and a buffer of that name is zero.

    Raises:
        CheckpointError: names are missing, extra, half of a fused group, of another shape or type, or a file
            is corrupt. The message lists the names and the file.
    """
    checkpoint = open_checkpoint(folder)
    targets = module.state_dict()
    plan = _plan(targets, checkpoint, rename, ignorable)
    with ExitStack() as stack:
        reader = _Reader(checkpoint, stack, {name for names in plan.values() for name in names})
        _check_shapes(plan, targets, reader)
        dtype = dtype or reader.commonest_dtype()
        loaded = {name: reader.read(plan[name], targets[name].shape, device, dtype) for name in plan}
    for name in targets.keys() - plan.keys():
        loaded[name] = torch.zeros(targets[name].shape, dtype=targets[name].dtype, device=device)
    module.load_state_dict(loaded, strict=True, assign=True)
    _check_nothing_on_meta(module)


class _Reader:
    """The needed files of a checkpoint, open for as long as its stack."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack, needed: set[str]) -> None:
        self.folder = checkpoint.folder
        self._files = {name: checkpoint.files[name] for name in needed}
        self._handles = {path: stack.enter_context(_open(path)) for path in sorted(set(self._files.values()))}
        for path, handle in self._handles.items():
            listed = {name for name, file in checkpoint.files.items() if file == path}
            _refuse(self.folder, [(f"{path.name} and the index disagree on", listed ^ set(handle.keys()))])
        slices = {name: self._handles[path].get_slice(name) for name, path in self._files.items()}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self._dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        foreign = [f"{name} ({kind})" for name, kind in self._dtypes.items() if kind not in _DTYPES]
        _refuse(self.folder, [(f"not one of {', '.join(_DTYPES)}:", foreign)])

    def commonest_dtype(self) -> torch.dtype:
        counts: Counter[str] = Counter()
        for name, kind in self._dtypes.items():
            counts[kind] += prod(self.shapes[name])
        return _DTYPES[counts.most_common(1)[0][0]]

    def read(
        self, names: tuple[str, ...], shape: torch.Size, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """Copies the named tensors, stacked along the first axis, into one new tensor."""
        target = torch.empty(shape, dtype=dtype, device=device)
        if len(names) == 1:
            return target.copy_(self._get(names[0]))
        row = 0
        for name in names:
            row_count = self.shapes[name][0]
            target[row : row + row_count].copy_(self._get(name))
            row += row_count
        return target

    def _get(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            tensor: Tensor = self._handles[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
        return tensor


def _weight_source(folder: Path) -> Path:
    """Picks the folder's index or its only file."""
    indexes = sorted(folder.glob("*" + _INDEX_SUFFIX))
    stems = {path.name.removesuffix(_INDEX_SUFFIX) for path in indexes}
    shards = {name for stem in stems for name in folder.glob(f"{stem}-*-of-*.safetensors")}
    sources = indexes + sorted(set(folder.glob("*.safetensors")) - shards)
    default = [path for path in sources if path.name.split(".safetensors")[0] in _DEFAULT_STEMS]
    candidates = default or sources
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(f"{folder} has several sets of weights: {_listed(p.name for p in candidates)}")
    pickles = [path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(f"{folder} has only pickle files, which are never read: {_listed(pickles)}")
    raise CheckpointError(f"{folder} has no *.safetensors file")


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    outside = {name for name in weight_map.values() if Path(name).name != name}
    _refuse(path, [("names files outside its folder:", outside)])
    return {tensor: path.parent / name for tensor, name in weight_map.items()}


def _plan(
    targets: Iterable[str], checkpoint: Checkpoint, rename: Rename, ignorable: Callable[[str], bool]
) -> dict[str, tuple[str, ...]]:
    """Maps each parameter to the checkpoint's names, or refuses with every name that does not fit."""
    available = {name for name in checkpoint.files if not ignorable(name)}
    plan: dict[str, tuple[str, ...]] = {}
    missing: list[str] = []
    half: list[str] = []
    for target in targets:
        names = rename.get(target, (target,))
        present = [name for name in names if name in available]
        if len(present) == len(names):
            plan[target] = names
        elif not present and target in available:
            plan[target] = (target,)
        elif present:
            half.append(f"{target} (has {', '.join(present)} of {', '.join(names)})")
        elif not ignorable(target):
            missing.extend(names)
    used = {name for names in plan.values() for name in names}
    halves = {name for target in targets for name in rename.get(target, ())} - used if half else set()
    extra = available - used - halves
    problems = [("missing:", missing), ("half of a fused group:", half), ("not part of this model:", extra)]
    _refuse(checkpoint.folder, problems)
    return plan


def _check_shapes(plan: Rename, targets: Mapping[str, Tensor], reader: _Reader) -> None:
    wrong = []
    for target, names in plan.items():
        expected = tuple(targets[target].shape)
        shapes = [reader.shapes[name] for name in names]
        if len(names) > 1 and all(shapes):
            together = (sum(shape[0] for shape in shapes), *expected[1:])
            fits = together == expected and all(shape[1:] == expected[1:] for shape in shapes)
        else:
            fits = shapes == [expected]
        if not fits:
            found = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
            wrong.append(f"{found} instead of {expected}")
    _refuse(reader.folder, [("of another shape than the configuration says:", wrong)])


def _check_nothing_on_meta(module: nn.Module) -> None:
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise RuntimeError(f"non-persistent tensors must be real before loading: {_listed(left)}")


def _open(path: Path) -> Any:
    """Opens one safetensors file, memory-mapped."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file: {error}") from None


def _refuse(place: Path, problems: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raises with every non-empty list of names."""
    found = [f"{what} {_listed(names)}" for what, names in problems if names]
    if found:
        raise CheckpointError(f"{place}: {'; '.join(found)}")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
