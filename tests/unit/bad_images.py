"""Good and bad images, made in memory, as a decoder meets them in a bucket of photographs."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112


def gradient_rgb(width: int = 120, height: int = 80) -> np.ndarray:
    """Return a smooth uint8 RGB picture whose every corner has another colour."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([40 + 180 * x, 40 + 180 * y, 220 - 180 * x * y], axis=2).round().astype(np.uint8)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    """Return the bytes of `image` in one of Pillow's formats."""
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def jpeg(width: int = 120, height: int = 80) -> bytes:
    """Return a sound JPEG of `gradient_rgb`."""
    return encoded(Image.fromarray(gradient_rgb(width, height)), "JPEG", quality=95)


@cache
def large_jpeg() -> bytes:
    """Return a JPEG of 2,400 x 1,800 pixels."""
    return jpeg(2_400, 1_800)


def empty() -> bytes:
    """Return a file of 0 bytes."""
    return b""


def text() -> bytes:
    """Return text, saved as .jpg."""
    return b"Dear Sir or Madam, please find attached the photograph.\n"


def corrupt_jpeg() -> bytes:
    """Return bytes that begin as a JPEG and go on as noise."""
    return jpeg()[:4] + np.random.default_rng(0).integers(0, 255, 4_000, dtype=np.uint8).tobytes()


def corrupt_png() -> bytes:
    """Return a PNG with a flipped byte in the middle of its pixels."""
    data = bytearray(encoded(Image.fromarray(gradient_rgb()), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def truncated_jpeg() -> bytes:
    """Return the first half of a JPEG."""
    data = jpeg(600, 400)
    return data[: len(data) // 2]


def truncated(format_name: str) -> bytes:
    """Return the first half of a noisy picture in one of Pillow's formats."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format_name)
    return data[: len(data) // 2]


def png_bomb(side_px: int = 30_000) -> bytes:
    """Return a valid black PNG of `side_px` squared: 900 million pixels in about 110 KB (1 bit a pixel)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = bytes(1 + (side_px + 7) // 8)
    compressor = zlib.compressobj(9)
    pixels = b"".join(compressor.compress(row) for _ in range(side_px)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    """Return a GIF of three frames: red, green, blue."""
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def cmyk_jpeg() -> bytes:
    """Return `gradient_rgb` as a CMYK JPEG, inverted as Adobe's programs write them (and as Pillow does)."""
    return encoded(Image.fromarray(gradient_rgb()).convert("CMYK"), "JPEG", quality=95)


def png_16_bit_grey() -> bytes:
    """Return a 16-bit grey PNG that rises from 0 to 65,535 from left to right."""
    ramp = np.tile(np.linspace(0, 65_535, 256).round().astype(np.uint16), (16, 1))
    return encoded(Image.fromarray(ramp), "PNG")


def png_16_bit_rgb() -> bytes:
    """Return `gradient_rgb` as a PNG of 16 bits a channel, which Pillow can't write."""
    rgb = gradient_rgb()
    height, width = rgb.shape[:2]
    wide = (rgb.astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    body = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        body += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return body


def palette_png() -> bytes:
    """Return a palette PNG, its left half red and its right half transparent."""
    image = Image.new("P", (60, 40), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (30, 0, 60, 40))
    return encoded(image, "PNG", transparency=1)


def rgba_png() -> bytes:
    """Return an RGBA PNG, its left half opaque red and its right half transparent black."""
    image = Image.new("RGBA", (60, 40), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return encoded(image, "PNG")


def grey_alpha_png() -> bytes:
    """Return a grey PNG with alpha, its left half opaque mid-grey and its right half transparent black."""
    image = Image.new("LA", (60, 40), (128, 255))
    image.paste((0, 0), (30, 0, 60, 40))
    return encoded(image, "PNG")


def grey_jpeg() -> bytes:
    """Return a JPEG with one channel."""
    return encoded(Image.fromarray(gradient_rgb()).convert("L"), "JPEG", quality=95)


def oriented_jpeg(orientation: int) -> bytes:
    """Return a JPEG that shows `gradient_rgb` once its EXIF orientation (1 to 8) is obeyed."""
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(gradient_rgb())
    if orientation in turn_back:
        image = image.transpose(turn_back[orientation])
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encoded(image, "JPEG", quality=95, exif=exif)


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """Return a PNG of uncompressed `rows`, each with its filter byte, with further `chunks` before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + png_chunk(b"IHDR", header) + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """Return a PNG's chunk, with its right checksum unless another is given."""
    if checksum is None:
        checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_samples(values: np.ndarray, *chunks: bytes) -> bytes:
    """Return a PNG of 16-bit samples, (height, width, channels), as they are."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, *chunks)


def with_png_chunks(*chunks: bytes) -> bytes:
    """Return a PNG of `gradient_rgb` with further chunks between its header and its pixels."""
    data = encoded(Image.fromarray(gradient_rgb()), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def with_jpeg_segments(*segments: tuple[int, bytes]) -> bytes:
    """Return a JPEG of `gradient_rgb` that begins with segments, each a marker and a body."""
    data = jpeg()
    begin = b"".join(b"\xff" + bytes([code]) + struct.pack(">H", len(body) + 2) + body for code, body in segments)
    return data[:2] + begin + data[2:]


def tiff_with_tag(tag: int, offset: bytes) -> bytes:
    """Return a TIFF of `gradient_rgb` in which the value of a text tag is said to be at `offset`."""
    data = encoded(Image.fromarray(gradient_rgb()), "TIFF", tiffinfo={tag: "x" * 300})
    start = struct.unpack_from("<I", data, 4)[0]
    for position in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, position)[0] == tag:
            return data[: position + 8] + offset + data[position + 12 :]
    raise AssertionError(f"the TIFF has no tag {tag}")


def bmp_32_bit(alpha: int) -> bytes:
    """Return a BMP of `gradient_rgb` with a fourth channel that its header calls alpha, the same everywhere."""
    rgb = gradient_rgb()
    height, width = rgb.shape[:2]
    bgra = np.dstack([rgb[::-1, :, ::-1], np.full((height, width), alpha, np.uint8)]).tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(bgra), 0, 0, 0, 0) + masks + b"BGRs"
    header += bytes(108 - len(header))
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(bgra), 0, 0, 14 + len(header)) + header + bgra


def heic(name: str = "plain") -> bytes:
    """Return a HEIC of `gradient_rgb` from tests/unit/heic; no library that the tests use writes any."""
    return (Path(__file__).parent / "heic" / f"{name}.heic").read_bytes()


def webp(**options: object) -> bytes:
    """Return a WebP of `gradient_rgb`."""
    return encoded(Image.fromarray(gradient_rgb()), "WEBP", quality=95, **options)


def animated_webp() -> bytes:
    """Return a WebP of two frames: `gradient_rgb`, and red."""
    return webp(save_all=True, append_images=[Image.new("RGB", (120, 80), "red")], duration=50)


def mpo() -> bytes:
    """Return the two pictures that some cameras put into one JPEG."""
    picture = Image.fromarray(gradient_rgb())
    return encoded(picture, "MPO", save_all=True, append_images=[picture], quality=95)


def exif_bytes(orientation: int) -> bytes:
    """Return EXIF, without the heading that JPEG has."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def hex_profile(orientation: int) -> bytes:
    """Return EXIF as ImageMagick writes it into a PNG's text."""
    profile = b"Exif\0\0" + exif_bytes(orientation)
    return f"\nexif\n{len(profile):8}\n{profile.hex()}\n".encode()


def xmp(orientation: int) -> bytes:
    """Return the part of an XMP packet that counts."""
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


def avif_with_broken_exif() -> bytes:
    """Return an AVIF of `gradient_rgb` whose EXIF is not even TIFF."""
    marker = b"MM\0*\0\0\0\x08"
    data = encoded(Image.fromarray(gradient_rgb()), "AVIF", quality=95, exif=b"Exif\0\0" + marker + bytes(40))
    assert marker in data
    return data.replace(marker, b"\xff" * len(marker))


REJECTED = {
    "bomb.png": (png_bomb, "too_large"),
    "corrupt.jpg": (corrupt_jpeg, "unreadable"),
    "empty.jpg": (empty, "not_an_image"),
    "text.jpg": (text, "not_an_image"),
    "truncated.jpg": (truncated_jpeg, "unreadable"),
}
"""Files that no job can use by name: what makes them, and the status of their rows."""
