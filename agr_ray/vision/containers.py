"""Image file formats: detect the format, read the orientation, and strip the metadata.

Decoders read metadata before pixels, and fail if the metadata is broken or too long. So JPEG, PNG, WebP and TIFF files
are reduced to their pixels first. Only the orientation matters, and it is read here.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

from PIL import Image

ORIENTATION_TAG: Final = 0x0112

_MAX_TEXT_BYTES: Final = 2**20  # limit for metadata that may hold an orientation
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_HUFFMAN_CODED: Final = (0xC0, 0xC1, 0xC2)
"""Markers of JPEG frames with Huffman codes, whose shortest code has one bit."""
_MAX_SCANS: Final = 200
"""Maximum scans of a progressive JPEG, which usually has ten: each scan, however short, takes time for all pixels."""

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PALETTE: Final = 3  # colour type
_ITEM_ENTRY: Final = re.compile(rb"(.{4})infe(?:\x02.{3}.{4}|\x03.{3}.{6}|[^\x02\x03].{3})", re.DOTALL)
"""Item entry box of a HEIF file, up to the item's type; the type and everything after it are text."""

_BMP_HEADERS: Final = (12, 40, 52, 56, 64, 108, 124)  # header lengths in bytes, one for each version
_HEIF_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIF_BRANDS: Final = (b"avif", b"avis")
_TIFF_SIGNATURES: Final = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")

_CLASSIC_TIFF: Final = 42  # BigTIFF is 43
_TIFF_PIXEL_TAGS: Final = frozenset(
    {
        *(256, 257, 258, 259, 262, 266, 277, 284, 338, 339),  # size, sample format and layout
        ORIENTATION_TAG,
        *(273, 278, 279, 322, 323, 324, 325),  # strips and tiles
        *(280, 281, 340, 341),  # minimum and maximum sample values
        *(292, 293, 317, 347, *range(512, 522)),  # compression
        *(320, 332, 529, 530, 531, 532),  # colours
    }
)


class BrokenFileError(ValueError):
    """A file whose pixel data is damaged or incomplete."""


class Pixels(NamedTuple):
    """A file without the metadata that decoding does not need."""

    data: bytes
    orientation: int | None = None
    """EXIF orientation, 1 to 8; None: the decoder takes care of it."""
    significant_bits: int | None = None
    """Significant bits per channel, if the file states them."""
    is_decoded_whole: bool = True
    """Whether the decoder holds all pixels of the file in memory, even if it shrinks the image while decoding."""


def format_of(data: bytes) -> str | None:
    """Return the image format indicated by the first bytes; None if the format is not supported."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_SIGNATURE):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(_TIFF_SIGNATURES):
        return "TIFF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if data[4:8] == b"ftyp":
        # The first brand is the major one; both formats use mif1 and msf1.
        box_bytes = min(int.from_bytes(data[:4], "big"), 256)
        brands = [data[8:12], *(data[start : start + 4] for start in range(16, box_bytes - 3, 4))]
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "AVIF"
        if any(brand in _HEIF_BRANDS for brand in brands):
            return "HEIF"
    return None


def pixels_of(data: bytes, format_name: str) -> Pixels:
    """Return the file without metadata, and what the metadata says about the pixels.

    Raises:
        BrokenFileError: the pixel data is damaged or incomplete.
    """
    strip = _STRIPPERS.get(format_name)
    return strip(data) if strip else Pixels(data)


def exif_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation (1 to 8) from EXIF, else from XMP; 1 if both are missing or broken."""
    if exif:
        try:
            parsed = Image.Exif()
            parsed.load(exif)
            orientation = int(parsed[ORIENTATION_TAG])
        except (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, struct.error, RuntimeError):
            pass  # broken metadata must not make a photograph unreadable
        else:
            return orientation if 1 <= orientation <= 8 else 1
    match = _XMP_ORIENTATION.search(xmp[:_MAX_TEXT_BYTES])
    return int(match[1]) if match else 1


def _jpeg(data: bytes) -> Pixels:
    """Drop application segments and comments, except the two that define the colours.

    Each block of 8 x 8 pixels takes at least one bit, so a small file that claims to be huge lacks most of them.
    libjpeg would make them up.
    """
    pieces, exif, xmp = [data[:2]], [], b""
    position, num_components, is_progressive, is_whole = 2, 0, False, True
    while data[position : position + 1] == b"\xff":
        marker, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        end = position + 2 + length
        code = marker[0] if marker else 0
        if code < 0xC0 or 0xD0 <= code <= 0xD9 or code == 0xFF or length < 2 or end > len(data):
            break  # invalid here; leave it for the decoder to reject
        body = data[position + 4 : end]
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
        elif code == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = body
        if _is_kept_segment(code, body):
            pieces.append(data[position:end])
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            is_progressive = code not in (0xC0, 0xC1)
            num_components = body[5] if len(body) > 5 else 0
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if code in _HUFFMAN_CODED and 8 * len(data) < -(-height // 8) * -(-width // 8):
                raise BrokenFileError("truncated")
        position = end
        if code == 0xDA:
            is_whole = is_progressive or not body or body[0] < num_components
            if is_whole and data.count(b"\xff\xda", position) > _MAX_SCANS:
                raise BrokenFileError(f"has more than {_MAX_SCANS} scans")
            break
    return Pixels(
        b"".join([*pieces, data[position:]]),
        exif_orientation(b"".join([b"Exif\0\0", *exif]) if exif else b"", xmp),
        is_decoded_whole=is_whole,
    )


def _is_kept_segment(code: int, body: bytes) -> bool:
    if code == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if code == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12
    return not (0xE1 <= code <= 0xEF or code == 0xFE)


def _png(data: bytes) -> Pixels:
    """Keep the header, palette, transparency and pixels; their checksums must be correct."""
    pieces = [_PNG_SIGNATURE]
    exif = profile = xmp = b""
    significant_bits = colour_type = None
    for kind, body, chunk, is_sound in _png_chunks(data):
        if kind in (b"IHDR", b"IDAT") or (kind == b"PLTE" and colour_type == _PNG_PALETTE):
            if not is_sound:
                raise BrokenFileError(f"bad checksum in {kind.decode()}")
            pieces.append(chunk)
            if kind == b"IHDR" and len(body) >= 10:
                colour_type = body[9]
        elif not is_sound:
            continue
        elif kind == b"tRNS" and len(body) >= {0: 2, 2: 6}.get(colour_type or 0, 1):
            pieces.append(chunk)
        elif kind == b"sBIT" and body:
            significant_bits = max(body)
        elif kind == b"eXIf":
            exif = body
        elif kind in (b"tEXt", b"zTXt") and body.startswith(b"Raw profile type exif\0"):
            profile = _hex_profile(_png_text(kind, body))
        elif kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = _png_text(kind, body)
    pieces.append(b"\0\0\0\0IEND\xaeB`\x82")
    return Pixels(b"".join(pieces), exif_orientation(exif or profile, xmp), significant_bits)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """Yield the kind, body and bytes of each chunk before IEND, and whether its checksum is correct."""
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"IEND" or not kind.isalpha():
            return
        if end > len(data):
            if kind in (b"IHDR", b"IDAT"):
                raise BrokenFileError("truncated")
            return
        chunk = data[position:end]
        body = chunk[8:-4]
        yield kind, body, chunk, zlib.crc32(memoryview(chunk)[4:-4]) == int.from_bytes(chunk[-4:], "big")
        position = end


def _png_text(kind: bytes, body: bytes) -> bytes:
    """Return the first MiB of a text chunk's text."""
    text = body.partition(b"\0")[2]
    is_compressed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    if is_compressed:
        try:
            return zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES)
        except zlib.error:
            return b""
    return text[:_MAX_TEXT_BYTES]


def _hex_profile(text: bytes) -> bytes:
    """Return the EXIF data that ImageMagick writes as hexadecimal digits after three header lines."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _webp(data: bytes) -> Pixels:
    """Keep the pixels of the first frame."""
    pieces: list[bytes] = []
    exif = xmp = b""
    position, num_frames = 12, 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length + length % 2
        chunk = data[position:end]
        if kind == b"VP8X" and len(chunk) == 18:
            flags = chunk[8] & ~(0x20 | 0x08 | 0x04)  # no ICC profile, EXIF or XMP follows
            pieces.append(chunk[:8] + bytes([flags]) + chunk[9:])
        elif kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM") or (kind == b"ANMF" and num_frames == 0):
            pieces.append(chunk)
            num_frames += kind == b"ANMF"
        elif kind == b"EXIF":
            exif = chunk[8:]
        elif kind == b"XMP ":
            xmp = chunk[8:]
        position = end
    body = b"WEBP" + b"".join(pieces)
    return Pixels(b"RIFF" + struct.pack("<I", len(body)) + body, exif_orientation(exif, xmp))


def _tiff(data: bytes) -> Pixels:
    """Keep only the first page, and of its tags those that describe the pixel storage."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"

    def number(start: int, length: int) -> int:
        return int.from_bytes(data[start : start + length], order)

    start = number(4, 4)
    end = start + 2 + 12 * number(start, 2)
    if number(2, 2) != _CLASSIC_TIFF or end > len(data):
        return Pixels(data)
    entries = [data[position : position + 12] for position in range(start + 2, end, 12)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in _TIFF_PIXEL_TAGS]
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)  # no next page
    return Pixels(data[:start] + directory + data[start + len(directory) :])


def _avif(data: bytes) -> Pixels:
    """Rename the EXIF item to hide it from decoders; an AVIF's orientation is in its own boxes."""
    start, end = _box(data, b"meta")
    renamed = re.sub(rb"(infe.{8,10})Exif", rb"\1none", data[start:end], flags=re.DOTALL)
    return Pixels(data[:start] + renamed + data[end:])


def _heif(data: bytes) -> Pixels:
    """Keep the whole file, and find out whether the decoder rotates the pixels upright.

    The decoder applies the boxes irot and imir, and EXIF usually repeats them. Some programs write only EXIF.
    """
    start, end = _box(data, b"meta")
    for entry in _ITEM_ENTRY.finditer(data, start, end):
        length = int.from_bytes(entry[1], "big")
        try:
            data[entry.end() : entry.start() + length].decode()
        except UnicodeDecodeError as error:  # would crash pi-heif 1.4
            raise BrokenFileError("the name of an item is not UTF-8") from error
    is_turned = any(data.find(kind, start, end) >= 0 for kind in (b"irot", b"imir"))
    return Pixels(data, orientation=1 if is_turned else None)


def _box(data: bytes, kind: bytes) -> tuple[int, int]:
    """Return start and end of a box in an ISO media file; both are 0 if there is none."""
    position = 0
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:  # a 64-bit length follows the kind
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if data[position + 4 : position + 8] == kind:
            return position, position + (length or len(data))
        if length < 8:
            break
        position += length
    return 0, 0


_STRIPPERS: Final[dict[str, Callable[[bytes], Pixels]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "TIFF": _tiff,
    "AVIF": _avif,
    "HEIF": _heif,
}
