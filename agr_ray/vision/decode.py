"""Decode photographs to upright 8-bit RGB, within limits that are checked before decoding."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageFile

from agr_ray.schema import Status
from agr_ray.vision.containers import ORIENTATION_TAG, BrokenFileError, format_of, pixels_of
from agr_ray.vision.pixels import brighten_dim_16_bit, is_16_bit_colour, rgb_of

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""The formats of photographs. Pillow reads dozens more, but each would be one more parser exposed to hostile bytes.
JPEG includes MPO; HEIF includes HEIC, which iPhones write."""

MAX_BYTES: Final = 64 * 2**20
MAX_PIXELS: Final = 180_000_000

# How pixels of EXIF orientations 2 to 8 become upright: whether they are flipped left to right, and the number of
# quarter turns (counter-clockwise, as np.rot90) after that.
_FLIP_AND_TURNS: Final = {
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}

# Errors that Pillow's parsers raise on broken files, found by fuzzing its formats or in its source.
DECODING_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


_NUM_CONTINUATIONS: Final = 4
_CONTINUATION_BYTES: Final = 2000

_Opener = Callable[[io.BytesIO], ImageFile.ImageFile]


class ImageError(Exception):
    """An image that can't be read. It is data, not a failure: `status` goes into the image's row.

    `status` is one of NOT_AN_IMAGE, UNREADABLE and TOO_LARGE; the message is one line.
    """

    def __init__(self, status: Status, message: str) -> None:
        """Store `status`, and `message` as one line."""
        self.status = status
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[type[ImageError], tuple[Status, str]]:
        """Make the error picklable: it has more arguments than its message."""
        return type(self), (self.status, str(self))


@dataclass(frozen=True)
class DecodedImage:
    """An upright photograph.

    `rgb` is uint8, height x width x 3, contiguous, and may be smaller than the original;
    `width_px` and `height_px` are the size of the original, upright.
    """

    rgb: NDArray[np.uint8]
    width_px: int
    height_px: int

    @property
    def scale(self) -> float:
        """Return original pixels per pixel of `rgb`, at least 1: boxes in `rgb` times this are in original pixels."""
        return max(self.width_px, self.height_px) / int(max(self.rgb.shape[:2]))


def decode_image(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, max_side_px: int | None = None
) -> DecodedImage:
    """Decode one photograph to upright 8-bit RGB.

    The longer side of the result is at most `max_side_px` (None: no limit); nothing is enlarged. Large JPEGs
    are shrunk while they are decoded. Transparent pixels are composited on white. Samples of more than 8 bits are
    scaled to 8. Only the first frame of an animation or a multi-page file is decoded. Embedded ICC profiles are
    ignored, and so is broken or overlong metadata.

    `max_pixels` limits the number of pixels that decoding holds in memory: of a baseline JPEG, its size after
    shrinking; of a progressive one, its full size.

    Raises:
        ImageError: with the status NOT_AN_IMAGE, UNREADABLE (corrupt or truncated: never a half-grey image)
            or TOO_LARGE (over `max_bytes` or `max_pixels`, checked before decoding). Equal reasons have equal
            messages.
    """
    if not data:
        raise ImageError(Status.NOT_AN_IMAGE, "the file is empty")
    if len(data) > max_bytes:
        raise ImageError(Status.TOO_LARGE, f"the file has more than {max_bytes} bytes")
    format_name = format_of(data)
    if format_name is None:
        raise ImageError(Status.NOT_AN_IMAGE, f"not one of {', '.join(FORMATS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata and palettes; neither changes the result
            return _decode(data, format_name, max_pixels, max_side_px)
    except Image.DecompressionBombError as error:
        raise ImageError(Status.TOO_LARGE, f"{format_name}: a part of it has too many pixels") from error
    except DECODING_ERRORS as error:
        raise ImageError(Status.UNREADABLE, f"{format_name}: {_reason(error)}") from error


def _decode(data: bytes, format_name: str, max_pixels: int, max_side_px: int | None) -> DecodedImage:
    pixels = pixels_of(data, format_name)
    with _open(pixels.data, format_name) as image:
        width, height = image.size
        if max_side_px is not None:
            image.draft(None, _bounded(width, height, max_side_px))  # JPEG only: decode at 1/2, 1/4 or 1/8
        num_pixels = width * height if pixels.is_decoded_whole else image.width * image.height
        if num_pixels > max_pixels:
            raise ImageError(Status.TOO_LARGE, f"{format_name}: more than {max_pixels} pixels to decode")
        drafted_size, has_16_bits = image.size, is_16_bit_colour(image)
        if format_name == "JPEG" and not pixels.is_decoded_whole:
            _load_sequential_jpeg(image, pixels.data)
        else:
            image.load()
        if image.size == drafted_size[::-1]:  # Pillow itself rotates a TIFF upright
            width, height = height, width
        orientation = _orientation(image) if pixels.orientation is None else pixels.orientation
        size = (width, height) if max_side_px is None else _bounded(width, height, max_side_px)
        if has_16_bits:
            brighten_dim_16_bit(image, lambda: _open(pixels.data, format_name))
        reduction = max(image.size) // max(size)
        rgb = _resized(rgb_of(image, reduction, pixels.significant_bits), size)
    if orientation in _FLIP_AND_TURNS:
        flip, quarter_turns = _FLIP_AND_TURNS[orientation]
        rgb = np.ascontiguousarray(np.rot90(rgb[:, ::-1] if flip else rgb, quarter_turns))
        if quarter_turns % 2:
            width, height = height, width
    return DecodedImage(rgb, width, height)


def _load_sequential_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """Load a baseline JPEG that may have been shrunk by `draft`; if only its end marker is missing, add it.

    libjpeg makes up missing blocks from the bytes that follow the data. If no block is missing, the image is the same
    whatever bytes follow.

    Raises:
        OSError: blocks are missing.
    """
    try:
        image.load()
    except OSError:
        data = data.rstrip(b"\xff")
        whole = _drafted_like(image, data + b"\xff\xd9")
        expected = whole.tobytes()
        for seed in range(_NUM_CONTINUATIONS):
            noise = random.Random(seed).randbytes(_CONTINUATION_BYTES).replace(b"\xff", b"\0")
            if _drafted_like(image, data + noise + b"\xff\xd9").tobytes() != expected:
                raise
        image.im = whole.im
        image.tile = []


def _drafted_like(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    again = _open(data, "JPEG")
    again.draft(None, image.size)
    again.load()
    return again


def _open(data: bytes, format_name: str) -> ImageFile.ImageFile:
    """Open a file of a known format without Pillow's own pixel limit."""
    return _opener(format_name)(io.BytesIO(data))


@cache
def _opener(format_name: str) -> _Opener:
    """Return Pillow's single-threaded reader of a format, because each worker has one CPU."""
    if format_name == "HEIF":
        import pi_heif

        pi_heif.options.DECODE_THREADS = 1
        # Auxiliary images of a photograph, such as thumbnails and depth maps.
        pi_heif.options.THUMBNAILS = pi_heif.options.DEPTH_IMAGES = pi_heif.options.AUX_IMAGES = False
        return cast(_Opener, pi_heif.HeifImageFile)
    if format_name == "AVIF":
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.init()  # registers formats that Pillow does not load by default
    return cast(_Opener, Image.OPEN[format_name][0])


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode uint8 RGB, height x width x 3, as a baseline JPEG."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(encoded)


def decode_crop(jpeg: bytes) -> NDArray[np.uint8]:
    """Decode a crop from `encode_jpeg` to uint8 RGB; faster than `decode_image`, but without its checks.

    Raises:
        ImageError: UNREADABLE, if the bytes are not a JPEG.
    """
    buffer = np.frombuffer(jpeg, np.uint8)
    rgb = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if len(buffer) else None
    if rgb is None:
        raise ImageError(Status.UNREADABLE, f"a crop of {len(jpeg)} bytes is not a JPEG")
    return np.asarray(rgb, dtype=np.uint8)


def _bounded(width: int, height: int, max_side_px: int) -> tuple[int, int]:
    """Return the size with the same aspect ratio whose longer side is at most `max_side_px`; never larger."""
    factor = min(1.0, max_side_px / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized(rgb_image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image that is less than twice as large as `size`, shrunk to it.

    At such factors the result is nearer to Lanczos's than that of a filter against aliasing, in half the time.
    """
    pixels = _pixels(rgb_image)
    if rgb_image.size != size:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(pixels if pixels.shape[2] == 3 else cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), np.uint8)


def _pixels(rgb_image: Image.Image) -> Any:
    """Return the pixels of an RGB image, (height, width, 3 or 4); the fourth channel is padding."""
    try:
        flat = pa.array(rgb_image).flatten().to_numpy()  # without a copy, which takes as long as shrinking
    except ValueError:  # Pillow keeps large images in several blocks
        return np.asarray(rgb_image, np.uint8)
    return flat.reshape(rgb_image.height, rgb_image.width, 4)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 if the metadata is broken, because that must not make a photograph unreadable."""
    try:
        # pi-heif moves the orientation from EXIF to `original_orientation`.
        return int(image.info.get("original_orientation") or image.getexif().get(ORIENTATION_TAG, 1))
    except DECODING_ERRORS:
        return 1


def _reason(error: BaseException) -> str:
    """Return an error's message without details that differ between files: numbers, bytes, addresses of objects."""
    message = str(error) or type(error).__name__
    if isinstance(error, BrokenFileError):
        return message
    if "truncated" in message.lower():
        return "truncated"
    if isinstance(error, LookupError):  # its message is only the key
        message = f"{type(error).__name__}: {message}"
    message = re.sub(r"\([^()]*\)|<[^<>]*>|b'[^']*'|b\"[^\"]*\"|(?<=property )'[^']*'", "", message)
    return " ".join(re.sub(r"0x[0-9a-fA-F]+|[0-9]+", "N", message).split())[:200]
