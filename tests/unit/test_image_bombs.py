"""Small files that claim to be huge, in every format: rejected at once, within a few megabytes of memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import bad_images
import numpy as np
import pytest
from PIL import Image

from agr_ray.schema import Status
from agr_ray.vision.decode import ImageError, decode_image

HUGE = 60_000
"""Pixels a side: 3.6 thousand million pixels, 10 GB as RGB."""
MAX_MIB = 40
MEASURE = """
import resource, sys
from pathlib import Path
from agr_ray.vision.decode import ImageError, decode_image
peak_mib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
decode_image(Path(sys.argv[1]).read_bytes())
before = peak_mib()
try:
    decode_image(Path(sys.argv[2]).read_bytes(), max_side_px=1280)
except ImageError as error:
    print(error.status, peak_mib() - before)
else:
    print("ok", peak_mib() - before)
"""


def small(format_name: str, **options: object) -> bytes:
    return bad_images.encoded(Image.fromarray(bad_images.gradient_rgb()), format_name, **options)


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


def jpeg(**options: object) -> bytes:
    return replaced(small("JPEG", **options), struct.pack(">HH", 80, 120), struct.pack(">HH", HUGE, HUGE))


def webp() -> bytes:
    """Return a lossless WebP that claims the largest size of the format, 16,384 pixels a side."""
    data = bytearray(small("WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") | 2**28 - 1).to_bytes(4, "little")
    return bytes(data)


def webp_canvas() -> bytes:
    """Return an animated WebP whose canvas claims 16,777,216 pixels a side, and its frame half of them."""
    data = bytearray(bad_images.animated_webp())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = b"\xff" * 6
    return bytes(data)


def gif() -> bytes:
    data = small("GIF")
    return data[:6] + struct.pack("<HH", HUGE, HUGE) + data[10:]


def gif_frame() -> bytes:
    """Return a GIF whose frame is far larger than its screen."""
    data = small("GIF")
    header = b"," + struct.pack("<HHHH", 0, 0, 120, 80)
    return replaced(data, header, b"," + struct.pack("<HHHH", 0, 0, HUGE, HUGE))


def bmp() -> bytes:
    return replaced(small("BMP"), struct.pack("<ii", 120, 80), struct.pack("<ii", HUGE, HUGE))


def tiff(compression: str) -> bytes:
    data = bytearray(small("TIFF", compression=compression))
    start = struct.unpack_from("<I", data, 4)[0]
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] in (256, 257, 278):  # width, height, rows of a strip
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, HUGE)
    return bytes(data)


def isobmff(data: bytes) -> bytes:
    """Return an AVIF or HEIC with huge image spatial extents."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", HUGE, HUGE) + data[at + 8 :]


def png_text() -> bytes:
    """Return a PNG whose text expands to 200 MB."""
    text = bad_images.png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(200_000_000)))
    return bad_images.with_png_chunks(text)


BOMBS: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "PNG": (bad_images.png_bomb, ("too_large",)),
    "PNG, text": (png_text, ("ok",)),
    "JPEG": (lambda: jpeg(), ("unreadable",)),
    "JPEG, progressive": (lambda: jpeg(progressive=True), ("unreadable",)),
    "WebP": (webp, ("too_large",)),
    "WebP, canvas": (webp_canvas, ("too_large", "unreadable")),
    "GIF": (gif, ("too_large",)),
    "GIF, frame": (gif_frame, ("too_large",)),
    "BMP": (bmp, ("too_large",)),
    **{f"TIFF, {name}": (lambda name=name: tiff(name), ("too_large",)) for name in ("raw", "tiff_lzw", "tiff_deflate")},
    "AVIF": (lambda: isobmff(small("AVIF")), ("too_large", "unreadable")),
    "HEIC": (lambda: isobmff(bad_images.heic()), ("too_large", "unreadable")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_time_and_no_memory(name: str, tmp_path: Path) -> None:
    make, statuses = BOMBS[name]
    bomb = make()
    assert len(bomb) < 500_000
    (tmp_path / "sound").write_bytes(bad_images.heic() if name == "HEIC" else small(name.partition(",")[0].upper()))
    (tmp_path / "bomb").write_bytes(bomb)

    command = [sys.executable, "-c", MEASURE, str(tmp_path / "sound"), str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)

    assert done.returncode == 0, done.stderr
    status, mib = done.stdout.split()
    assert status in statuses
    assert float(mib) < MAX_MIB


@pytest.mark.parametrize("format_name", ["GIF", "WEBP"])
def test_only_the_first_of_many_frames_is_decoded(format_name: str) -> None:
    frames = [Image.new("P", (60, 40), number % 256) for number in range(1_000)]
    with io.BytesIO() as body:
        first = Image.fromarray(bad_images.gradient_rgb(60, 40))
        first.save(body, format_name, save_all=True, append_images=frames, duration=20)
        data = body.getvalue()

    began_s = time.process_time()
    image = decode_image(data)

    assert time.process_time() - began_s < 1.0
    assert np.abs(image.rgb.astype(float) - bad_images.gradient_rgb(60, 40)).mean() < 10


@pytest.mark.parametrize("name", BOMBS)
def test_a_truncated_bomb_is_rejected_too(name: str) -> None:
    bomb = BOMBS[name][0]()

    with pytest.raises(ImageError) as raised:
        decode_image(bomb[: len(bomb) // 2], max_pixels=1_000_000)

    assert raised.value.status in (Status.TOO_LARGE, Status.UNREADABLE)
