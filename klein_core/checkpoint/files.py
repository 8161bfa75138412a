"""Which safetensors files make up one component, and which tensor lies in which. Torch-free.

A component is one file, or a folder with one `*.safetensors` or with shards and their
`*.safetensors.index.json`. Pickle is not a format of this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from klein_core.errors import CheckpointError, listed, refuse
from klein_core.safetensors_header import Header, StoredTensor, open_regular, read_header
from klein_core.variants import read_json

_INDEX_SUFFIX = ".safetensors.index.json"
_DEFAULT_STEMS = ("diffusion_pytorch_model", "model")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor of one component lies. Headers of shards are read when a tensor of theirs is asked for."""

    place: Path
    """The folder or the file, for messages."""
    files: Mapping[str, Path]
    """Tensor name → the safetensors file that holds it."""
    _headers: dict[Path, Header] = field(default_factory=dict, repr=False)

    def header(self, path: Path) -> Header:
        """Returns one file's header, checked.

        Raises:
            CheckpointError: the file is missing or malformed, or holds other tensors than the index says.
        """
        if path not in self._headers:
            header = read_header(path)
            told = {name for name, file in self.files.items() if file == path}
            problem = f"{path.name} and the index disagree on"
            refuse(self.place, [(problem, told ^ header.tensors.keys())])
            self._headers[path] = header
        return self._headers[path]

    def entry(self, name: str) -> StoredTensor:
        """Returns dtype, shape and place of a tensor; raises as `header`."""
        return self.header(self.files[name]).tensors[name]

    def content(self, name: str) -> bytes:
        """Reads a small tensor's bytes; raises as `header`, and when the file was cut since."""
        entry, path = self.entry(name), self.files[name]
        with open_regular(path) as file:
            file.seek(entry.start)
            content = file.read(entry.byte_count)
        if len(content) < entry.byte_count:
            raise CheckpointError(f"{path}: {name} cannot be read: the file was cut since it was opened")
        return content

    def metadata(self) -> dict[str, str]:
        """Returns what the writers of all the files said; raises as `header`."""
        merged: dict[str, str] = {}
        for path in sorted(set(self.files.values())):
            merged |= self.header(path).metadata
        return merged


def open_checkpoint(place: Path | str, root: Path | None = None) -> Checkpoint:
    """Finds a component's tensors without reading any.

    Args:
        place: one file, or a folder with one set of weights.
        root: the folder that symbolic links in `place` may not leave; `place` itself when unset. A file that is
            named outright may be a link to anywhere: who named it chose it.

    Raises:
        CheckpointError: no safetensors, two sets of them, only pickle files, a corrupt header or index, or a link
            that leaves the folder.
    """
    place = Path(place)
    if not place.is_dir():
        header = read_header(place)
        return Checkpoint(place, dict.fromkeys(header.tensors, place), {place: header})
    source = _weight_source(place)
    files = _read_index(source) if source.name.endswith(_INDEX_SUFFIX) else {}
    _check_links(place, root or place, {source, *files.values()})
    if files:
        return Checkpoint(place, files)
    header = read_header(source)
    return Checkpoint(place, dict.fromkeys(header.tensors, source), {source: header})


def is_inside(path: Path, root: Path) -> bool:
    """Whether a file, its links followed, lies in a folder, or is what a folder of the hub's cache links to."""
    target, root = path.resolve(), root.resolve()
    return target.is_relative_to(root) or any(
        target.is_relative_to(parent.parent / "blobs")
        for parent in (root, *root.parents)
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    )


def _check_links(place: Path, root: Path, paths: Iterable[Path]) -> None:
    outside = {path.name for path in paths if not is_inside(path, root)}
    refuse(place, [(f"links that leave {root}; name such a file itself instead:", outside)])


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
        raise CheckpointError(f"{folder} has several sets of weights: {listed(p.name for p in candidates)}")
    pickles = [path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(f"{folder} has only pickle files, which are never read: {listed(pickles)}")
    raise CheckpointError(f"{folder} has no *.safetensors file")


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    outside = {name for name in weight_map.values() if Path(name).name != name or not name.isprintable()}
    refuse(path, [("names files outside its folder:", outside)])
    return {tensor: path.parent / name for tensor, name in weight_map.items()}
