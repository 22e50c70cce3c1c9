"""Bytes of a photograph to upright 8-bit RGB, with limits that hold before anything is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from agr_ray.schema import Status

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What a store of photographs holds. Pillow reads dozens more, each one more parser for hostile bytes.
JPEG includes MPO."""

MAX_BYTES: Final = 64 * 2**20
MAX_PIXELS: Final = 150_000_000
"""Above 178,956,970 a limit has no effect: Pillow itself refuses such files."""

_ORIENTATION_TAG: Final = 0x0112

# The bytes behind EXIF orientations 2 to 8: how many quarter turns (counter-clockwise, as np.rot90) after an
# optional left-right flip.
_FLIP_AND_TURNS: Final = {
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}

# What Pillow's parsers raise on broken files; each was met while its formats were fuzzed, or is raised in their source.
_DECODING_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class ImageError(Exception):
    """An image that can't be read. It is data, not a failure: `status` goes into the image's row.

    `status` is one of NOT_AN_IMAGE, UNREADABLE and TOO_LARGE; the message is one line.
    """

    def __init__(self, status: Status, message: str) -> None:
        """Keep `status`, and `message` as one line."""
        self.status = status
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[type[ImageError], tuple[Status, str]]:
        """Make the error picklable: it has more arguments than its message."""
        return type(self), (self.status, str(self))


@dataclass(frozen=True)
class DecodedImage:
    """An upright photograph.

    `rgb` is uint8, height x width x 3, contiguous, and may be smaller than the original;
    `width_px` and `height_px` are those of the original, upright.
    """

    rgb: NDArray[np.uint8]
    width_px: int
    height_px: int

    @property
    def scale(self) -> float:
        """Return original pixels per pixel of `rgb`, at least 1: multiply detected boxes by it."""
        return max(self.width_px, self.height_px) / int(max(self.rgb.shape[:2]))


def decode_image(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, max_side_px: int | None = None
) -> DecodedImage:
    """Decode one photograph to upright 8-bit RGB.

    The longer side of the result is at most `max_side_px` (None: as it is); nothing is enlarged. Large JPEGs
    are shrunk while they are decoded. Transparency is laid on white; 16-bit files are scaled to 8 bits;
    of an animation or a multi-page file the first frame is taken; embedded ICC profiles are ignored.

    Raises:
        ImageError: with the status NOT_AN_IMAGE, UNREADABLE (corrupt or truncated: never a half-grey image)
            or TOO_LARGE (over `max_bytes` or `max_pixels`, seen before anything is decoded).
    """
    if not data:
        raise ImageError(Status.NOT_AN_IMAGE, "the file is empty")
    if len(data) > max_bytes:
        raise ImageError(Status.TOO_LARGE, f"{len(data)} bytes; at most {max_bytes} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs, odd metadata and palettes: none changes the result
        return _decode(data, max_pixels, max_side_px)


def _decode(data: bytes, max_pixels: int, max_side_px: int | None) -> DecodedImage:
    Image.init()  # registers the formats that Pillow does not load at once; does nothing the second time
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(Status.TOO_LARGE, str(error)) from error
    except _DECODING_ERRORS as error:
        if _claims_to_be_an_image(data):
            raise ImageError(Status.UNREADABLE, _reason(error)) from error
        raise ImageError(Status.NOT_AN_IMAGE, f"not one of {', '.join(FORMATS)}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(Status.TOO_LARGE, f"{width} x {height} pixels; at most {max_pixels} pixels are decoded")
        try:
            if image.format == "PNG":  # decoding alone does not look at its checksums
                Image.open(io.BytesIO(data), formats=FORMATS).verify()
            if max_side_px is not None:
                image.draft(None, _bounded(width, height, max_side_px))  # JPEG only: decode at 1/2, 1/4 or 1/8
            drafted_size = image.size
            image.load()
            if image.size == drafted_size[::-1]:  # Pillow turns a TIFF upright itself
                width, height = height, width
            orientation = _orientation(image)
            size = (width, height) if max_side_px is None else _bounded(width, height, max_side_px)
            rgb = _resized(_to_rgb(image), size)
        except Image.DecompressionBombError as error:
            raise ImageError(Status.TOO_LARGE, str(error)) from error
        except _DECODING_ERRORS as error:
            raise ImageError(Status.UNREADABLE, _reason(error)) from error
    if orientation in _FLIP_AND_TURNS:
        flip, quarter_turns = _FLIP_AND_TURNS[orientation]
        rgb = np.ascontiguousarray(np.rot90(rgb[:, ::-1] if flip else rgb, quarter_turns))
        if quarter_turns % 2:
            width, height = height, width
    return DecodedImage(rgb, width, height)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode uint8 RGB, height x width x 3, as a baseline JPEG."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(encoded)


def decode_crop(jpeg: bytes) -> NDArray[np.uint8]:
    """Decode a crop that `encode_jpeg` wrote to uint8 RGB, faster than `decode_image` and with none of its checks.

    Raises:
        ImageError: UNREADABLE, if the bytes are not a JPEG.
    """
    buffer = np.frombuffer(jpeg, np.uint8)
    rgb = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if len(buffer) else None
    if rgb is None:
        raise ImageError(Status.UNREADABLE, f"a crop of {len(jpeg)} bytes is not a JPEG")
    return np.asarray(rgb, dtype=np.uint8)


def _bounded(width: int, height: int, max_side_px: int) -> tuple[int, int]:
    """Return the size that keeps the shape and whose longer side is at most `max_side_px`."""
    factor = min(1.0, max_side_px / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized(rgb_image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image at `size`, which is no larger.

    What Pillow's resize gives, but torch takes a quarter of its time.
    """
    whole_steps = rgb_image.width // (2 * size[0])
    if whole_steps > 1:
        rgb_image = rgb_image.reduce(whole_steps)
    if rgb_image.size == size:
        return np.array(rgb_image, dtype=np.uint8)
    rgb_nchw = torch.from_numpy(np.asarray(rgb_image, dtype=np.uint8)).permute(2, 0, 1)[None]
    red, green, blue = functional.interpolate(rgb_nchw, size[::-1], mode="bilinear", antialias=True)[0].numpy()
    return np.asarray(cv2.merge([red, green, blue]), np.uint8)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 where the metadata is broken: that alone spoils no photograph."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODING_ERRORS:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB.

    Raises:
        ValueError: where the mode has no defined white, such as floating point.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255 instead of scaling.
        values: NDArray[Any] = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB", "RGBX", "RGB"):
        return image.convert("RGB")
    raise ValueError(f"pixels of mode {image.mode} are not a photograph's")


def _claims_to_be_an_image(data: bytes) -> bool:
    """Return whether the first bytes are the signature of a format that is read."""
    return (
        data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or (data[:2] == b"BM" and data[6:10] == b"\0\0\0\0")
        or data[4:12] == b"ftypavif"
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
