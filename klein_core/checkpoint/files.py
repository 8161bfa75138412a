"""Which safetensors files make up one component, and which tensor lies in which. Torch-free.

A component is one file, or a folder with one `*.safetensors` or with shards and their
`*.safetensors.index.json`. Pickle is not a format of this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_core.checkpoint.header import Header, StoredTensor, open_regular, read_header
from klein_core.errors import CheckpointError, listed, raise_if_problems
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
            raise_if_problems(self.place, [(problem, told ^ header.tensors.keys())])
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
    raise_if_problems(place, [(f"links that leave {root}; name such a file itself instead:", outside)])


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
    raise_if_problems(path, [("names files outside its folder:", outside)])
    return {tensor: path.parent / name for tensor, name in weight_map.items()}


TOKENIZER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What the person who starts a pipeline or a stage named. A part of its own wins over the model's."""

    model: Path | None = None
    """A folder in diffusers' layout, or one safetensors file from which every part not named below is taken."""
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    """Like the two before: a safetensors file, or a folder with one set of weights and perhaps a config.json."""
    tokenizer: Path | None = None
    """A folder; needed beside a text encoder that is a bare file."""
    variant: str = ""
    """Which published model it is, where no model_index.json tells."""

    @classmethod
    def of(cls, files: ModelFiles | Path | str) -> ModelFiles:
        """Takes a model's folder or file for the whole model."""
        return files if isinstance(files, ModelFiles) else cls(model=Path(files))

    @classmethod
    def alone(cls, component: str, place: Path) -> ModelFiles:
        """Takes a file or folder for one component, and nothing for the others."""
        named: dict[str, Any] = {component: place}
        return cls(**named)

    def place(self, component: str) -> Path:
        """Returns the file or folder of `transformer`, `vae` or `text_encoder`; it need not be there.

        Raises:
            CheckpointError: neither the component nor a whole model is named.
        """
        own: Path | None = getattr(self, component)
        if own is not None:
            return own / component if (own / component).is_dir() else own
        if self.model is None:
            raise CheckpointError(f"the model has no {component}: name a file or folder of its own for it")
        if not self.model.is_dir() or self._is_flat(component):
            return self.model
        return self.model / component

    def open(self, component: str) -> Checkpoint:
        """Finds a component's tensors without reading any; raises CheckpointError as `open_checkpoint`."""
        place = self.place(component)
        return open_checkpoint(place, self._root(place))

    def config_path(self, component: str) -> Path | None:
        """Returns a component's config.json; `None` when it has none and its tensors must tell.

        Raises:
            CheckpointError: the component is not named, or the file is a link that leaves the folder.
        """
        place = self.place(component)
        path = place / "config.json"
        if not place.is_dir() and (place.exists() or place.suffix == ".safetensors"):
            return None
        if not path.is_file() and any(place.glob("*.safetensors")):
            return None
        if not is_inside(path, self._root(place)):
            raise CheckpointError(f"{path} is a link that leaves {self._root(place)}")
        return path

    @property
    def index_path(self) -> Path | None:
        """The model's model_index.json; `None` where there cannot be one."""
        if self.model is None or not self.model.is_dir():
            return None
        path = self.model / "model_index.json"
        is_bare = self.transformer is not None or self._is_flat("transformer")
        return None if is_bare and not path.is_file() else path

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer's folder.

        Raises:
            CheckpointError: none is named, and a bare file has none.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.model is None or not self.model.is_dir():
            raise CheckpointError(
                "the text encoder is a bare file, which has no tokenizer: name a tokenizer folder"
            )
        return self.model / TOKENIZER

    def _is_flat(self, component: str) -> bool:
        """Whether the model's folder has weights itself and none in a folder of the component."""
        folder = self.model
        return (
            folder is not None
            and not (folder / component).is_dir()
            and not (folder / "model_index.json").exists()
            and any(folder.glob("*.safetensors"))
        )

    def _root(self, place: Path) -> Path:
        """Returns the folder that was named: links inside may not leave it."""
        inside = self.model is not None and place.is_relative_to(self.model)
        return self.model if inside and self.model is not None else place
