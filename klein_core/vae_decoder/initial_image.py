"""The initial image of a masked edit and its mask: decoding, cropping, expanding, and laying the result over it.

What is not said otherwise is as in `Flux2KleinInpaintPipeline` of diffusers: the image is scaled down to about 1 MP and
stretched to multiples of 16; the mask is cut at half of its range and scaled to one value a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from klein_core.errors import InvalidInput
from klein_core.params import NO_EXPANSION, SIZE_MULTIPLE_PX, Expansion
from klein_core.vae_decoder.image_io import (
    DEFAULT_REFERENCE_LIMITS,
    MODEL_PIXEL_COUNT,
    ReferenceLimits,
    decode_rgb,
    open_image,
    scale_to_area,
)

CANVAS_GRAY = (127, 127, 127)
"""Color of the canvas around an expanded image, before it is painted over."""
_HALF = 128
"""Mask values from here on are painted over: the first that is at least 0.5 of 255."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are excluded."""


@dataclass(frozen=True)
class InitialImage:
    """A prepared initial image. What is denoised is `crop` of it, or all of it, at `width_px` × `height_px`."""

    image: Image.Image
    """RGB, about 1 MP at most."""
    mask: Image.Image
    """L, 255 is made anew; of the image's size where there is a crop, else (width_px, height_px)."""
    crop: Box | None

    @property
    def width_px(self) -> int:
        return _multiple(self.image.width)

    @property
    def height_px(self) -> int:
        return _multiple(self.image.height)

    def pixels(self) -> Image.Image:
        """Returns the RGB image that the autoencoder encodes, (width_px, height_px)."""
        return self._fitted(self.image)

    def token_mask(self) -> Tensor:
        """Returns the mask as the trajectory needs it: float32, (rows, columns, 1).

        Cut at half of its range, then scaled bilinearly, so that tokens on its edge have values between 0 and 1.
        """
        cut = np.asarray(self._fitted(self.mask)) >= _HALF
        rows, columns = self.height_px // SIZE_MULTIPLE_PX, self.width_px // SIZE_MULTIPLE_PX
        pixels = torch.from_numpy(cut.astype(np.float32))[None, None]
        return torch.nn.functional.interpolate(pixels, size=(rows, columns), mode="bilinear")[0].permute(
            1, 2, 0
        )

    def laid_over(self, made: Tensor) -> Tensor:
        """Returns the initial image's own pixels outside the mask and `made` inside: uint8, (H, W, 3).

        The mask's own values, not cut, are the weights, so a soft mask has a soft edge. With a crop the whole initial
        image is returned, in its own size, with the made part scaled into its place.

        Args:
            made: uint8, (height_px, width_px, 3).
        """
        image = Image.fromarray(made.numpy())
        if self.crop is None:
            return _mixed(image, self.pixels(), self._fitted(self.mask))
        left, top, right, bottom = self.crop
        base = self.image.copy()
        base.paste(_covering(image, (right - left, bottom - top)), (left, top))
        return _mixed(base, self.image, self.mask)

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = (self.width_px, self.height_px)
        if self.crop is None:
            return image.resize(size, Image.Resampling.LANCZOS)
        return _filled(image.crop(self.crop), size)


def prepare_initial_image(
    data: bytes,
    mask: bytes | None = None,
    *,
    mask_is_alpha: bool = False,
    mask_padding_px: int | None = None,
    expand: Expansion = NO_EXPANSION,
    pixel_count: int = MODEL_PIXEL_COUNT,
    limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS,
) -> InitialImage:
    """Decodes an initial image and its mask.

    Args:
        data: the image's file.
        mask: the mask's file, of the image's aspect; white is made anew. `None` means all of it, or, where the image is
            expanded, the added sides.
        mask_is_alpha: the mask's alpha channel counts instead, and 0 is made anew, as in OpenAI's API.
        mask_padding_px: denoise only the mask's bounding box, widened by so many pixels and to the image's aspect.
        expand: sides to add; they are made anew.
        pixel_count: most pixels of what is denoised; a larger image is scaled down to them, and to 1 MP in any case.
        limits: of both files.

    Raises:
        InvalidInput: a file is not an acceptable image, the mask is empty or selects no token, has another aspect or
            no alpha channel, or the expanded image is outside the limits.
    """
    image = decode_rgb(open_image(data, field="initial_image", limits=limits), "initial_image")
    _check_expansion(expand, image.size, limits)
    gray = _decode_mask(mask, mask_is_alpha, image.size, limits) if mask is not None else None
    if gray is None:
        gray = Image.new("L", image.size, 0 if expand else 255)
    if expand:
        image, gray = _expanded(image, gray, expand)
    image = scale_to_area(image, min(pixel_count, MODEL_PIXEL_COUNT))
    if np.asarray(gray).max() < _HALF:
        raise InvalidInput.of("mask", "is empty: no pixel is bright enough to be made anew")
    crop = None
    if mask_padding_px is not None:
        gray = gray.resize(image.size, Image.Resampling.LANCZOS)
        crop = _crop_box(gray, mask_padding_px)
    else:
        # Now, so that a large mask does not wait in memory.
        gray = gray.resize((_multiple(image.width), _multiple(image.height)), Image.Resampling.LANCZOS)
    prepared = InitialImage(image, gray, crop)
    if not prepared.token_mask().any():
        raise InvalidInput.of(
            "mask", "is too small: it selects no token of 16×16 pixels; widen it, or use mask_padding_px"
        )
    return prepared


def _check_expansion(expand: Expansion, size: tuple[int, int], limits: ReferenceLimits) -> None:
    width, height = size[0] + expand.left + expand.right, size[1] + expand.top + expand.bottom
    made = f"makes {width}×{height} pixels"
    if width * height > limits.pixel_count:
        raise InvalidInput.of("expand", f"{made}; at most {limits.pixel_count} in all are allowed")
    if max(width, height) > limits.aspect_ratio * min(width, height):
        raise InvalidInput.of(
            "expand", f"{made}; one side may be at most {limits.aspect_ratio} times the other"
        )


def _decode_mask(data: bytes, is_alpha: bool, size: tuple[int, int], limits: ReferenceLimits) -> Image.Image:
    opened = open_image(data, field="mask", limits=limits)
    if is_alpha:
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            raise InvalidInput.of("mask", "has no alpha channel, and its alpha channel is asked for")
        gray = ImageOps.invert(_upright_alpha(opened))
    else:
        gray = decode_rgb(opened, "mask").convert("L")
    (width, height), (image_width, image_height) = gray.size, size
    if abs(width * image_height - height * image_width) > max(image_width, image_height):
        raise InvalidInput.of(
            "mask",
            f"is {width}×{height} pixels; its aspect must be that of the initial image, {size[0]}×{size[1]}",
        )
    return gray


def _upright_alpha(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    except MemoryError:
        raise
    # Decoders raise nearly anything on malformed bytes.
    except Exception as error:
        raise InvalidInput.of("mask", f"is a damaged or truncated {image.format} image: {error}") from None


def _expanded(image: Image.Image, mask: Image.Image, expand: Expansion) -> tuple[Image.Image, Image.Image]:
    """Puts both on a larger canvas whose added sides are masked."""
    size = image.width + expand.left + expand.right, image.height + expand.top + expand.bottom
    canvas, wider = Image.new("RGB", size, CANVAS_GRAY), Image.new("L", size, 255)
    canvas.paste(image, (expand.left, expand.top))
    wider.paste(mask.resize(image.size, Image.Resampling.LANCZOS), (expand.left, expand.top))
    return canvas, wider


def _crop_box(mask: Image.Image, padding: int) -> Box:
    """Returns the mask's bounding box, padded, then widened on one axis to the aspect of what is denoised.

    Source: `VaeImageProcessor.get_crop_region` of diffusers.
    """
    width, height = mask.size
    box = mask.getbbox() or (0, 0, width, height)
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, width), min(box[3] + padding, height)
    aspect = _multiple(width) / _multiple(height)
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _widened(top, bottom, int((right - left) / aspect - (bottom - top)), height)
    else:
        left, right = _widened(left, right, int((bottom - top) * aspect - (right - left)), width)
    return left, top, right, bottom


def _multiple(side_px: int) -> int:
    """Rounds a side down to a size that the autoencoder takes."""
    return side_px // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX


def _widened(start: int, stop: int, by: int, limit: int) -> tuple[int, int]:
    """Grows a range by so many pixels, half on each side, and shifts it back into 0…limit."""
    start, stop = start - by // 2, stop + by - by // 2
    if stop >= limit:
        start, stop = start - (stop - limit), limit
    if start < 0:
        start, stop = 0, stop - start
    return start, min(stop, limit)


def _filled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales an image into `size` with its aspect kept; strips that stay free repeat its edge.

    Source: `VaeImageProcessor._resize_and_fill` of diffusers.
    """
    width, height = size
    aspect, own = width / height, image.width / image.height
    scaled_width = width if aspect < own else image.width * height // image.height
    scaled_height = height if aspect >= own else image.height * width // image.width
    scaled = image.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    filled = Image.new(image.mode, size)
    left, top = width // 2 - scaled_width // 2, height // 2 - scaled_height // 2
    filled.paste(scaled, (left, top))
    if aspect < own and top > 0:
        filled.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        edge = (0, scaled.height, width, scaled.height)
        filled.paste(scaled.resize((width, top), box=edge), (0, top + scaled_height))
    elif aspect > own and left > 0:
        filled.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        edge = (scaled.width, 0, scaled.width, height)
        filled.paste(scaled.resize((left, height), box=edge), (left + scaled_width, 0))
    return filled


def _covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales an image to cover `size` with its aspect kept and cuts what is outside: undoes `_filled`.

    Source: `VaeImageProcessor._resize_and_crop` of diffusers.
    """
    width, height = size
    aspect, own = width / height, image.width / image.height
    scaled_width = width if aspect > own else image.width * height // image.height
    scaled_height = height if aspect <= own else image.height * width // image.width
    covering = Image.new(image.mode, size)
    scaled = image.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    covering.paste(scaled, (width // 2 - scaled_width // 2, height // 2 - scaled_height // 2))
    return covering


def _mixed(made: Image.Image, kept: Image.Image, mask: Image.Image) -> Tensor:
    """Mixes two RGB images by a mask of the same size; where it is 0 the result is exactly `kept`."""
    weight = np.asarray(mask, dtype=np.float32)[..., None] / 255
    mixed = weight * np.asarray(made, dtype=np.float32) + (1 - weight) * np.asarray(kept, dtype=np.float32)
    return torch.from_numpy(np.rint(mixed).astype(np.uint8))
