"""Files of a model: the safetensors files of each component, and the tensors in each of them. Torch-free.

A component is one file, or a folder with one `*.safetensors` or with shards and their
`*.safetensors.index.json`. Pickle is not a format of this library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from klein_core.checkpoint.header import Header, StoredTensor, open_regular, read_header
from klein_core.errors import CheckpointError, listed, raise_if_problems
from klein_core.variants import read_json

_INDEX_SUFFIX = ".safetensors.index.json"
_DEFAULT_STEMS = ("diffusion_pytorch_model", "model")
TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a model's folder."""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one component, in one file or several. A shard's header is read on first use."""

    path: Path
    """The folder or the file, for messages."""
    files: Mapping[str, Path]
    """Tensor name → the safetensors file that holds it."""
    _headers: dict[Path, Header] = field(default_factory=dict, repr=False)

    def header(self, path: Path) -> Header:
        """Returns one file's header, checked.

        Raises:
            CheckpointError: the file is missing or malformed, or holds other tensors than the index lists.
        """
        if path not in self._headers:
            header = read_header(path)
            indexed = {name for name, file in self.files.items() if file == path}
            problem = f"{path.name} and the index disagree on"
            raise_if_problems(self.path, [(problem, indexed ^ header.tensors.keys())])
            self._headers[path] = header
        return self._headers[path]

    def entry(self, name: str) -> StoredTensor:
        """Returns a tensor's dtype, shape and position in its file; raises as `header`."""
        return self.header(self.files[name]).tensors[name]

    def content(self, name: str) -> bytes:
        """Reads a small tensor's bytes; raises as `header`, and when the file was truncated since."""
        entry, path = self.entry(name), self.files[name]
        with open_regular(path) as file:
            file.seek(entry.start)
            content = file.read(entry.byte_count)
        if len(content) < entry.byte_count:
            raise CheckpointError(
                f"{path}: {name} cannot be read: the file was truncated since it was opened"
            )
        return content

    @property
    def own_metadata(self) -> Mapping[str, str]:
        """Metadata of the only file's header; empty for shards, whose folder has a config.json."""
        paths = set(self.files.values())
        return self.header(*paths).metadata if len(paths) == 1 else {}

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of all the headers, merged; raises as `header`."""
        merged: dict[str, str] = {}
        for path in sorted(set(self.files.values())):
            merged |= self.header(path).metadata
        return merged


def open_checkpoint(path: Path | str, root: Path | None = None) -> Checkpoint:
    """Finds a component's tensors without reading any.

    Args:
        path: one file, or a folder with one set of weights.
        root: the folder that symbolic links below `path` may not leave; `path` itself when unset. A file that the
            user names directly may be a link to anywhere.

    Raises:
        CheckpointError: no safetensors, two sets of them, only pickle files, a corrupt header or index, or a link
            that leaves the folder.
    """
    path = Path(path)
    if not path.is_dir():
        header = read_header(path)
        return Checkpoint(path, dict.fromkeys(header.tensors, path), {path: header})
    source, root = _weight_source(path), root or path
    files = _read_index(source) if source.name.endswith(_INDEX_SUFFIX) else {}
    outside = {file.name for file in (source, *files.values()) if not is_inside(file, root)}
    raise_if_problems(path, [(f"links that leave {root}; name such a file itself instead:", outside)])
    if files:
        return Checkpoint(path, files)
    header = read_header(source)
    return Checkpoint(path, dict.fromkeys(header.tensors, source), {source: header})


def is_inside(path: Path, root: Path) -> bool:
    """Whether a file lies in a folder once links are resolved. The hub's cache links into its own `blobs` folder."""
    target, root = path.resolve(), root.resolve()
    return target.is_relative_to(root) or any(
        target.is_relative_to(parent.parent / "blobs")
        for parent in (root, *root.parents)
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    )


def _weight_source(folder: Path) -> Path:
    """Returns the folder's index or its only weights file."""
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


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files that a user names for a pipeline or a stage. A component's own path wins over the model's."""

    model: Path | None = None
    """A folder in diffusers' layout, or one safetensors file that holds every component not named below."""
    transformer: Path | None = None
    """A safetensors file, or a folder with one set of weights and optionally a config.json."""
    vae: Path | None = None
    """A file or folder, like `transformer`."""
    text_encoder: Path | None = None
    """A file or folder, like `transformer`."""
    tokenizer: Path | None = None
    """A folder; required with a text encoder that is a bare file."""
    variant: str = ""
    """Name of the published model, for files without a model_index.json."""

    @classmethod
    def of(cls, files: ModelFiles | Path | str) -> ModelFiles:
        """Returns `files` itself, or the files of a whole model that is one folder or file."""
        return files if isinstance(files, ModelFiles) else cls(model=Path(files))

    @classmethod
    def alone(cls, component: str, path: Path) -> ModelFiles:
        """Returns the files of a model of which only one component is named."""
        named: dict[str, Any] = {component: path}
        return cls(**named)

    def path(self, component: str) -> Path:
        """Returns the file or folder of `transformer`, `vae` or `text_encoder`; it may not exist.

        Raises:
            CheckpointError: neither the component nor a whole model is named.
        """
        own: Path | None = getattr(self, component)
        if own is not None:
            return own / component if (own / component).is_dir() else own
        if self.model is None:
            raise CheckpointError(f"the model has no {component}: name a file or folder for it")
        if not self.model.is_dir() or self._is_flat(component):
            return self.model
        return self.model / component

    def open(self, component: str) -> Checkpoint:
        """Finds a component's tensors without reading any; raises CheckpointError as `open_checkpoint`."""
        path = self.path(component)
        return open_checkpoint(path, self._root(path))

    def config_path(self, component: str) -> Path | None:
        """Returns a component's config.json; `None` when its configuration must be inferred from its tensors.

        Raises:
            CheckpointError: the component is not named, or the file is a link that leaves the folder.
        """
        path = self.path(component)
        config = path / "config.json"
        if not path.is_dir() and (path.exists() or path.suffix == ".safetensors"):
            return None
        if not config.is_file() and any(path.glob("*.safetensors")):
            return None
        if not is_inside(config, self._root(path)):
            raise CheckpointError(f"{config} is a link that leaves {self._root(path)}")
        return config

    @property
    def index_path(self) -> Path | None:
        """The model's model_index.json; `None` for bare files, which have none."""
        if self.model is None or not self.model.is_dir():
            return None
        path = self.model / "model_index.json"
        is_bare = self.transformer is not None or self._is_flat("transformer")
        return None if is_bare and not path.is_file() else path

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer's folder.

        Raises:
            CheckpointError: no tokenizer is named, and the model is a bare file.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.model is None or not self.model.is_dir():
            raise CheckpointError(
                "the text encoder is a bare file, which has no tokenizer: name a tokenizer folder"
            )
        return self.model / TOKENIZER

    def _is_flat(self, component: str) -> bool:
        """Whether weights lie in the model's folder itself and not in a folder of the component."""
        folder = self.model
        return (
            folder is not None
            and not (folder / component).is_dir()
            and not (folder / "model_index.json").exists()
            and any(folder.glob("*.safetensors"))
        )

    def _root(self, path: Path) -> Path:
        """Returns the folder that the user named, which links inside it may not leave."""
        return self.model if self.model is not None and path.is_relative_to(self.model) else path


def access_problem(path: Path) -> str:
    """Returns what keeps this process from reading a folder or file; empty when nothing does."""
    try:
        is_folder = S_ISDIR(path.stat().st_mode)
    except PermissionError:
        may_read = False
    except OSError:
        return "there is no such folder or file"
    else:
        wanted = os.R_OK | os.X_OK if is_folder else os.R_OK
        may_read = os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids)
    if may_read:
        return ""
    return f"uid {os.geteuid()} may not read it: change its owner or mode, or run as another user"
