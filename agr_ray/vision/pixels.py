"""Convert all of Pillow's pixel modes to 8-bit RGB."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

_BAND_PIXELS: Final = 4_000_000
"""Pixels converted at a time, because a second copy of a large image would double its memory."""

_FULL_SCALES: Final = (255, 1023, 4095, 65_535, 2**31 - 1, 2**32 - 1)
"""The value of white in images of 8, 10, 12, 16, 31 and 32 bits."""

_MAX_DIM: Final = 4095  # 12-bit samples stored unscaled in 16-bit files: nearly black if 65,535 is white
_GREY_ALPHA: Final = "LA;16B"  # Pillow's name for 16-bit grey with alpha, as stored in PNG

_WHITE_IS_ZERO: Final = 0
_PHOTOMETRIC_TAG: Final = 262
_BITS_TAG: Final = 258
_MAX_SAMPLE_TAG: Final = 281
_SAMPLE_FORMAT_TAG: Final = 339
_UNSIGNED: Final = 1
_SIGNED: Final = 2


def rgb_of(image: Image.Image, reduction: int = 1, significant_bits: int | None = None) -> Image.Image:
    """Return a loaded image as RGB, shrunk by an integer factor.

    Transparent pixels are composited on white. Samples of more than 8 bits are scaled by the image's bit depth; if the
    file does not state it, the smallest common depth that fits is assumed. For floating-point samples of at most 1,
    white is 1.

    Args:
        image: any mode that Pillow's readers produce.
        reduction: factor by which width and height are reduced.
        significant_bits: bits per sample, if the file states them.

    Raises:
        ValueError: the mode is not supported.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.reduce(reduction) if reduction > 1 else image
    band_of = _converter(image, significant_bits)
    width, height = image.size
    rows = max(1, _BAND_PIXELS // (width * reduction)) * reduction
    rgb = Image.new("RGB", (-(-width // reduction), -(-height // reduction)))
    for top in range(0, height, rows):
        band = band_of(top, min(top + rows, height))
        rgb.paste(band.reduce(reduction) if reduction > 1 else band, (0, top // reduction))
    return rgb


def _converter(image: Image.Image, significant_bits: int | None) -> Callable[[int, int], Image.Image]:
    """Return a function that converts a range of rows (start, end) to RGB."""

    def rows(top: int, bottom: int) -> Image.Image:
        return image.crop((0, top, image.width, bottom))

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey_converter(image, significant_bits)
    if image.mode == "LAB":
        from PIL import ImageCms

        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        return lambda top, bottom: ImageCms.applyTransform(rows(top, bottom), to_srgb) or rows(top, bottom)
    if image.has_transparency_data and not _has_void_alpha(image):
        return lambda top, bottom: _on_white(rows(top, bottom))
    if image.mode in ("1", "L", "LA", "La", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBX", "RGBA", "RGB"):
        return lambda top, bottom: rows(top, bottom).convert("RGB")
    raise ValueError(f"pixels of mode {image.mode} are not supported")


def _has_void_alpha(image: Image.Image) -> bool:
    """Return whether the fourth channel is all zeros, in a format where it is often padding instead of alpha.

    Browsers also show such BMPs as opaque.
    """
    return image.format in ("BMP", "TIFF") and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _on_white(band: Image.Image) -> Image.Image:
    if band.mode == "La":
        band = band.convert("LA")
    rgba = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_converter(image: Image.Image, significant_bits: int | None) -> Callable[[int, int], Image.Image]:
    values: NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits, sample_format = _first(tags.get(_BITS_TAG, 16)), _first(tags.get(_SAMPLE_FORMAT_TAG, _UNSIGNED))
    if image.mode == "I" and (bits, sample_format) == (32, _UNSIGNED):
        values = values.view(np.uint32)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        high = float(np.percentile(finite, 99)) if finite.size else 0.0  # highlights may be brighter than white
        white = 1.0 if high <= 1.0 else full_scale(high)
    else:
        if tags:
            declared = _first(tags.get(_MAX_SAMPLE_TAG, 0))
            declared_bits = declared.bit_length() if isinstance(declared, int) else 0
            significant_bits = declared_bits or bits - (sample_format == _SIGNED)
        white = full_scale(float(values.max()), significant_bits)
    is_inverted = tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    transparent = image.info.get("transparency")

    def band(top: int, bottom: int) -> Image.Image:
        raw = values[top:bottom]
        grey = np.nan_to_num(raw.astype(np.float64) * (255.0 / white), posinf=255.0)
        if is_inverted:
            grey = 255.0 - grey
        if isinstance(transparent, int):
            grey[raw == transparent] = 255.0
        return Image.fromarray((grey.clip(0, 255) + 0.5).astype(np.uint8)).convert("RGB")

    return band


def full_scale(high: float, significant_bits: int | None = None) -> float:
    """Return the value of white in an image whose brightest sample is `high`."""
    if significant_bits and significant_bits < 16 and high < 2**significant_bits:
        return float(2**significant_bits - 1)
    return float(next((scale for scale in _FULL_SCALES if high <= scale), high))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def brighten_dim_16_bit(image: Image.Image, reopen: Callable[[], ImageFile.ImageFile]) -> None:
    """Scale in place a loaded colour image of 16 bits per channel whose samples have 12 bits or fewer.

    Pillow keeps only the upper byte of each sample. `reopen` opens the same file again, unloaded; reading it with
    swapped bytes returns the lower bytes.
    """
    num_colours = 3 if image.mode == "RGBA" else len(image.getbands())
    if max(high for _, high in image.getextrema()[:num_colours]) > _MAX_DIM >> 8:  # type: ignore[misc]
        return
    lower = reopen()
    is_grey = any(tile.args == _GREY_ALPHA for tile in lower.tile)
    lower.tile = [tile._replace(args=_swapped(tile.args)) for tile in lower.tile]
    lower.load()
    num_rows = max(1, _BAND_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + num_rows, image.height)) for top in range(0, image.height, num_rows)]

    def samples(box: tuple[int, int, int, int]) -> list[NDArray[np.uint16]]:
        """Return the colours and the alpha channel, if there is one."""
        lower_bytes = np.asarray(lower.crop(box))
        if is_grey:
            lower_bytes = lower_bytes[..., [1, 1, 1, 3]]
        values = np.asarray(image.crop(box)).astype(np.uint16) << 8 | lower_bytes
        return [part for part in np.split(values, [num_colours], axis=2) if part.shape[2]]

    highs = np.max([[part.max(initial=0) for part in samples(box)] for box in boxes], axis=0)
    tables = [
        (np.arange(2**16) * (255.0 / full_scale(float(high))) + 0.5).clip(0, 255).astype(np.uint8) for high in highs
    ]
    for box in boxes:
        eight_bits = [table[part] for table, part in zip(tables, samples(box), strict=True)]
        image.paste(Image.fromarray(np.concatenate(eight_bits, axis=2), image.mode), box)


def is_16_bit_colour(image: ImageFile.ImageFile) -> bool:
    """Return whether an opened, not yet loaded image has several channels of 16 bits."""
    return bool(image.tile) and all(_swapped(tile.args) != tile.args for tile in image.tile)


def _swapped(args: Any) -> Any:
    """Return a tile's arguments with swapped byte order if its samples have 16 bits; otherwise unchanged."""
    rawmode = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else None
    if not isinstance(rawmode, str):
        return args
    if rawmode == _GREY_ALPHA:
        return "RGBA"  # a pixel's four bytes: upper and lower byte of grey, upper and lower byte of alpha
    name, _, order = rawmode.partition(";16")
    if name not in ("RGB", "RGBX", "RGBA", "CMYK") or order not in ("L", "B", "N"):
        return args
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    other = f"{name};16{'B' if little else 'L'}"
    return other if isinstance(args, str) else (other, *args[1:])
