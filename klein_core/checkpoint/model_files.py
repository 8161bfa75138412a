"""Where each part of one model lies: a folder for all of it, or a file or folder for each. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.checkpoint.files import Checkpoint, is_inside, open_checkpoint
from klein_core.errors import CheckpointError

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
