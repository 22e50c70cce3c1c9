"""Decoding: every kind of photograph is decoded correctly and upright, every bad file gets its status."""

import io
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import bad_images
import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from agr_ray.schema import Status
from agr_ray.vision import decode
from agr_ray.vision.decode import DecodedImage, ImageError, decode_crop, decode_image, encode_jpeg

MEASURE = """
import resource
from pathlib import Path
import numpy as np
from agr_ray.vision import decode
from agr_ray.vision.decode import DecodedImage, ImageError, decode_image

files = sorted(Path().glob("*.image"))
sound = [file.read_bytes() for file in files]
decode_image(sound[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rng = np.random.default_rng(1)
for data in sound:
    for _ in range(30):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(damaged), 200), 2):
            damaged[position] = rng.integers(0, 256)
        try:
            decode_image(bytes(damaged), max_pixels=4_000_000, max_side_px=1280)
        except ImageError:
            pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def mean_error(rgb: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(rgb.astype(float) - expected.astype(float)).mean())


def status_of(data: bytes, **limits: int) -> Status:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **limits)
    assert "\n" not in str(caught.value)
    return caught.value.status


@pytest.mark.parametrize("data", [bad_images.empty(), bad_images.text()])
def test_files_of_other_types_are_not_images(data: bytes) -> None:
    assert status_of(data) is Status.NOT_AN_IMAGE


def test_an_image_of_an_unsupported_format_is_not_an_image() -> None:
    assert status_of(bad_images.encoded(Image.new("RGB", (4, 4)), "PPM")) is Status.NOT_AN_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        bad_images.corrupt_jpeg(),
        bad_images.corrupt_png(),
        bad_images.truncated_jpeg(),
        *(bad_images.truncated(name) for name in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")),
        bad_images.heic()[:-500],
        bad_images.jpeg()[:-20],
        bad_images.encoded(Image.fromarray(bad_images.gradient_rgb()), "JPEG", progressive=True)[:-2],
    ],
)
def test_a_broken_image_is_unreadable(data: bytes) -> None:
    assert status_of(data) is Status.UNREADABLE


def sound_images() -> list[tuple[str, bytes]]:
    """Return a small sound file of each format and kind that decoding treats in its own way."""
    picture = Image.fromarray(bad_images.gradient_rgb(32, 24))
    exif = Image.Exif()
    exif[bad_images.ORIENTATION_TAG] = 6
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 16
    return [
        *((name, bad_images.encoded(picture, name)) for name in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")),
        *((name, bad_images.encoded(picture, name, exif=exif)) for name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")),
        ("JPEG", bad_images.encoded(picture, "JPEG", progressive=True)),
        ("JPEG", bad_images.encoded(picture.convert("CMYK"), "JPEG")),
        *(("TIFF", bad_images.encoded(picture, "TIFF", compression=name)) for name in ("tiff_lzw", "jpeg")),
        ("TIFF", bad_images.encoded(Image.fromarray(grey), "TIFF")),
        ("PNG", bad_images.png_samples(np.dstack([grey] * 3))),
        ("PNG", bad_images.palette_png()),
        ("GIF", bad_images.animated_gif()),
        ("WEBP", bad_images.animated_webp()),
        ("BMP", bad_images.bmp_32_bit(0)),
        *(("HEIF", bad_images.heic(name)) for name in ("plain", "mirrored_by_box_and_exif")),
    ]


@pytest.mark.parametrize("number", range(len(sound_images())), ids=lambda n: f"{n}-{sound_images()[n][0]}")
def test_damage_anywhere_gives_an_image_or_an_image_error(number: int) -> None:
    _, sound = sound_images()[number]
    rng = np.random.default_rng(number)
    decode_image(sound)
    for _ in range(150):
        data = bytearray(sound)
        # Half of the damage is in the first bytes, where sizes and offsets are.
        for position in (*rng.integers(0, len(data), 3), *rng.integers(0, min(len(data), 400), 3)):
            data[position] = rng.integers(0, 256)
        if rng.random() < 0.2:
            del data[rng.integers(1, len(data)) :]
        error, image = decoded(bytes(data), max_pixels=1_000_000, max_side_px=int(rng.choice([20, 1_000])))
        if image is None:
            assert not re.search(r"0x[0-9a-f]{6}|object at", str(error))
        else:
            height, width = image.rgb.shape[:2]
            assert image.rgb.dtype == np.uint8
            assert image.rgb.shape[2:] == (3,)
            assert height * width <= 1_000_000
            assert image.scale >= 1.0


def decoded(data: bytes, **limits: int) -> tuple[ImageError | None, DecodedImage | None]:
    """Return the image or the image error; any other error fails the test."""
    try:
        return None, decode_image(data, **limits)
    except ImageError as error:
        return error, None


def test_damaged_files_take_no_more_memory_than_the_pixel_limit_allows(tmp_path: Path) -> None:
    # In a process of its own: the peak of this one is not known.
    script = tmp_path / "decode_all.py"
    script.write_text(MEASURE)
    for number, (_, sound) in enumerate(sound_images()):
        (tmp_path / f"{number}.image").write_bytes(sound)

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250  # MiB; 4 million pixels of 15 bytes each, and what the decoders load


def test_a_decompression_bomb_is_rejected_without_being_decoded() -> None:
    bomb = bad_images.png_bomb()
    assert len(bomb) < 500_000
    tracemalloc.start()
    try:
        assert status_of(bomb) is Status.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_limits_of_bytes_and_pixels_are_kept() -> None:
    data = bad_images.jpeg(120, 80)
    assert status_of(data, max_bytes=len(data) - 1) is Status.TOO_LARGE
    assert status_of(data, max_pixels=120 * 80 - 1) is Status.TOO_LARGE
    assert decode_image(data, max_bytes=len(data), max_pixels=120 * 80).rgb.shape == (80, 120, 3)


def test_no_warning_of_a_large_image_leaks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert status_of(bad_images.png_bomb(10_000), max_pixels=50_000_000) is Status.TOO_LARGE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int) -> None:
    image = decode_image(bad_images.oriented_jpeg(orientation))
    assert (image.width_px, image.height_px) == (120, 80)
    assert mean_error(image.rgb, bad_images.gradient_rgb()) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_tiff_orientation_is_applied(orientation: int) -> None:
    stored = Image.open(io.BytesIO(bad_images.oriented_jpeg(orientation)))
    stored.load()
    tiff = bad_images.encoded(stored, "TIFF", tiffinfo={bad_images.ORIENTATION_TAG: orientation})
    image = decode_image(tiff, max_side_px=60)
    assert (image.width_px, image.height_px) == (120, 80)
    assert mean_error(image.rgb, bad_images.gradient_rgb(60, 40)) < 3


@pytest.mark.parametrize("data", [bad_images.png_16_bit_rgb(), bad_images.cmyk_jpeg()])
def test_16_bit_and_cmyk_colours_are_right(data: bytes) -> None:
    assert mean_error(decode_image(data).rgb, bad_images.gradient_rgb()) < 3


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    rgb = decode_image(bad_images.png_16_bit_grey()).rgb
    assert (rgb[0, :, 0] == np.arange(256)).all()


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (bad_images.palette_png(), (255, 0, 0)),
        (bad_images.rgba_png(), (255, 0, 0)),
        (bad_images.grey_alpha_png(), (128, 128, 128)),
    ],
)
def test_transparent_pixels_are_composited_on_white(data: bytes, left: tuple[int, int, int]) -> None:
    rgb = decode_image(data).rgb
    assert tuple(rgb[20, 10]) == left
    assert tuple(rgb[20, 50]) == (255, 255, 255)


def test_grey_has_three_equal_channels() -> None:
    rgb = decode_image(bad_images.grey_jpeg()).rgb
    assert rgb.shape == (80, 120, 3)
    assert (rgb[..., 0] == rgb[..., 2]).all()


def test_an_animation_gives_its_first_frame() -> None:
    assert tuple(decode_image(bad_images.animated_gif()).rgb[10, 10]) == (255, 0, 0)


@pytest.mark.parametrize("max_side_px", [300, 999, 2_399])
def test_the_longer_side_is_bounded_exactly(max_side_px: int) -> None:
    image = decode_image(bad_images.large_jpeg(), max_side_px=max_side_px)
    assert max(image.rgb.shape[:2]) == max_side_px
    assert (image.width_px, image.height_px) == (2_400, 1_800)
    assert image.scale == pytest.approx(2_400 / max_side_px)
    assert image.rgb.flags.c_contiguous


def test_a_scaled_jpeg_shows_the_same_image() -> None:
    rgb = decode_image(bad_images.large_jpeg(), max_side_px=500).rgb
    assert mean_error(rgb, bad_images.gradient_rgb(500, 375)) < 3


def test_thin_lines_of_a_narrow_picture_are_averaged_not_skipped() -> None:
    rgb = np.zeros((20_000, 3, 3), np.uint8)
    rgb[::16] = 240  # rows of the shrunk picture are 15.6 of these
    shrunk = decode_image(bad_images.encoded(Image.fromarray(rgb), "PNG"), max_side_px=1280).rgb
    assert shrunk.shape == (1280, 1, 3)
    assert shrunk.max() < 60


def test_nothing_is_enlarged() -> None:
    image = decode_image(bad_images.jpeg(120, 80), max_side_px=640)
    assert image.rgb.shape == (80, 120, 3)
    assert image.scale == 1.0


def test_a_crop_survives_jpeg() -> None:
    rgb = bad_images.gradient_rgb(96, 96)
    assert mean_error(decode_crop(encode_jpeg(rgb)), rgb) < 3


@pytest.mark.parametrize("data", [b"", b"no crop"])
def test_a_broken_crop_is_unreadable(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a JPEG"):
        decode_crop(data)


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Status.TOO_LARGE, "too\nlarge")))
    assert (error.status, str(error)) == (Status.TOO_LARGE, "too large")


THREE_MB = zlib.compress(b"a" * 3_000_000)


@pytest.mark.parametrize(
    "data",
    [
        bad_images.with_png_chunks(bad_images.png_chunk(b"zTXt", b"comment\0\0" + THREE_MB)),
        bad_images.with_png_chunks(bad_images.png_chunk(b"iTXt", b"comment\0\1\0\0\0" + THREE_MB)),
        bad_images.with_png_chunks(bad_images.png_chunk(b"iCCP", b"profile\0\0" + THREE_MB)),
        bad_images.with_png_chunks(*[bad_images.png_chunk(b"tEXt", b"comment\0" + b"a" * 1_000_000)] * 66),
        bad_images.with_png_chunks(bad_images.png_chunk(b"tEXt", b"comment\0text", checksum=0)),
        bad_images.with_png_chunks(bad_images.png_chunk(b"eXIf", b"junk", checksum=0)),
        bad_images.with_png_chunks(bad_images.png_chunk(b"zTXt", b"comment\0\7text")),
        bad_images.with_png_chunks(bad_images.png_chunk(b"iCCP", b"profile")),
        bad_images.with_png_chunks(bad_images.png_chunk(b"pHYs", b"short")),
        bad_images.with_png_chunks(bad_images.png_chunk(b"tRNS", b"s")),
        bad_images.with_png_chunks(
            bad_images.png_chunk(b"acTL", struct.pack(">II", 2, 0)), bad_images.png_chunk(b"fcTL", b"")
        ),
        bad_images.with_png_chunks()[:-12] + bad_images.png_chunk(b"zTXt", b"comment\0\0" + THREE_MB),
        bad_images.with_png_chunks()[:-6],
        bad_images.with_jpeg_segments((0xE0, b"JFIF\0")),
        bad_images.with_jpeg_segments((0xEE, b"Adobe")),
        bad_images.with_jpeg_segments((0xED, b"Photoshop 3.0\0" + b"8BIM\x04")),
        bad_images.with_jpeg_segments((0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
        bad_images.with_jpeg_segments((0xE1, b"Exif\0\0junk")),
        bad_images.with_jpeg_segments((0xE2, b"ICC_PROFILE\0\1")),
        bad_images.with_jpeg_segments(*[(0xE2, b"ICC_PROFILE\0\1\2" + b"x" * 60_000)] * 50),
        bad_images.with_jpeg_segments((0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
        bad_images.jpeg()[:-1],
        bad_images.jpeg()[:-2],
        bad_images.jpeg() + b"junk" * 20,
        bad_images.webp(exif=b"Exif\0\0junk", xmp=b"junk" * 100, icc_profile=b"junk" * 100),
        bad_images.webp(exif=b"Exif\0\0junk", xmp=b"junk" * 100)[:-150],
        bad_images.animated_webp()[:-10],
        bad_images.tiff_with_tag(270, b"\xff\xff\xff\x7f"),
        bad_images.tiff_with_tag(315, b"\xff\xff\xff\x7f"),
        bad_images.avif_with_broken_exif(),
        bad_images.mpo(),
        bad_images.mpo()[:-100],
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_bad_metadata_does_not_affect_the_pixels(data: bytes) -> None:
    assert mean_error(decode_image(data).rgb, bad_images.gradient_rgb()) < 3


def test_a_truncated_jpeg_is_decoded_or_rejected_alike_at_every_scale() -> None:
    data = bad_images.large_jpeg()
    for max_side_px in (None, 1280):
        expected = decode_image(data, max_side_px=max_side_px).rgb
        assert (decode_image(data[:-2], max_side_px=max_side_px).rgb == expected).all()
        for num_bytes in (4, 20, 200, 1_000, 5_000):
            with pytest.raises(ImageError, match="truncated"):
                decode_image(data[:-num_bytes], max_side_px=max_side_px)


@pytest.mark.parametrize(
    "chunk",
    [
        bad_images.png_chunk(b"eXIf", bad_images.exif_bytes(6)),
        bad_images.png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bad_images.hex_profile(6))),
        bad_images.png_chunk(b"tEXt", b"Raw profile type exif\0" + bad_images.hex_profile(6)),
        bad_images.png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bad_images.xmp(6)),
        bad_images.png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bad_images.xmp(6))),
    ],
)
def test_a_png_is_rotated_by_any_of_its_metadata(chunk: bytes) -> None:
    image = decode_image(bad_images.with_png_chunks(chunk))
    assert (image.width_px, image.height_px) == (80, 120)
    assert mean_error(image.rgb, np.rot90(bad_images.gradient_rgb(), -1)) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["WEBP", "AVIF", "PNG"])
def test_every_orientation_of_other_formats_is_applied_once(orientation: int, format_name: str) -> None:
    stored = Image.open(io.BytesIO(bad_images.oriented_jpeg(orientation)))
    stored.load()
    exif = Image.Exif()
    exif[bad_images.ORIENTATION_TAG] = orientation
    image = decode_image(bad_images.encoded(stored, format_name, exif=exif, quality=95))
    assert (image.width_px, image.height_px) == (120, 80)
    assert mean_error(image.rgb, bad_images.gradient_rgb()) < 3


def test_a_jpeg_without_exif_is_rotated_by_its_xmp() -> None:
    segment = (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bad_images.xmp(6))
    image = decode_image(bad_images.with_jpeg_segments(segment))
    assert mean_error(image.rgb, np.rot90(bad_images.gradient_rgb(), -1)) < 3


@pytest.mark.parametrize("name", ["plain", "turned_by_box_and_exif", "mirrored_by_box_and_exif", "turned_by_exif"])
def test_a_heic_is_rotated_once(name: str) -> None:
    image = decode_image(bad_images.heic(name))
    assert (image.width_px, image.height_px) == (120, 80)
    assert mean_error(image.rgb, bad_images.gradient_rgb()) < 3
    small = decode_image(bad_images.heic(name), max_side_px=60)
    assert mean_error(small.rgb, bad_images.gradient_rgb(60, 40)) < 3


def test_the_limits_apply_to_heic_too() -> None:
    assert status_of(bad_images.heic(), max_pixels=120 * 80 - 1) is Status.TOO_LARGE
    assert status_of(bad_images.heic()[:200]) is Status.UNREADABLE
    assert status_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"junk" * 100) is Status.UNREADABLE


@pytest.mark.parametrize("data", [bad_images.heic(), bad_images.encoded(Image.new("RGB", (640, 480)), "AVIF")])
def test_decoders_use_one_thread(data: bytes) -> None:
    decode_image(data)
    import pi_heif
    from PIL import AvifImagePlugin

    assert (pi_heif.options.DECODE_THREADS, AvifImagePlugin.DEFAULT_MAX_THREADS) == (1, 1)


GREY = np.repeat(np.asarray(Image.fromarray(bad_images.gradient_rgb()).convert("L"))[..., None], 3, axis=2)


def samples(eight_bits: np.ndarray, bits: int) -> np.ndarray:
    """Return 8-bit values as ones of another depth, with white and black in two corners."""
    values = np.round(eight_bits.astype(float) / 255 * (2**bits - 1)).astype(np.uint16)
    values[0, 0], values[-1, -1] = 2**bits - 1, 0
    return values


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_16_bit_samples_are_scaled_by_the_bits_in_use(bits: int, extension: str, num_channels: int) -> None:
    colours = GREY[..., :1] if num_channels == 1 else bad_images.gradient_rgb()
    values = samples(colours, bits)[..., ::-1]
    if num_channels == 4:
        values = np.dstack([values, np.full(values.shape[:2], 2**bits - 1, np.uint16)])
    data = cv2.imencode(extension, values)[1].tobytes()
    assert mean_error(decode_image(data).rgb, GREY if num_channels == 1 else colours) < 1


@pytest.mark.parametrize("alpha", [4095, 65_535])
def test_12_bit_grey_with_alpha_is_scaled(alpha: int) -> None:
    values = np.dstack([samples(GREY[..., :1], 12), np.full(GREY.shape[:2], alpha, np.uint16)])
    assert mean_error(decode_image(bad_images.png_samples(values)).rgb, GREY) < 1


def test_a_dim_image_stays_dim_if_the_file_gives_its_number_of_bits() -> None:
    values = (samples(GREY[..., :1], 12) / 8).astype(np.uint16)
    data = bad_images.png_samples(values, bad_images.png_chunk(b"sBIT", b"\x0c"))
    assert mean_error(decode_image(data).rgb, GREY / 8) < 1
    tiff = bad_images.encoded(Image.fromarray(values[..., 0]), "TIFF", tiffinfo={281: 4095})
    assert mean_error(decode_image(tiff).rgb, GREY / 8) < 1


def test_a_dim_16_bit_image_is_not_brightened() -> None:
    values = np.full((8, 8, 1), 20_000, np.uint16)
    assert (decode_image(bad_images.png_samples(values)).rgb == 78).all()
    assert (decode_image(bad_images.png_samples(np.repeat(values, 3, axis=2))).rgb == 78).all()


@pytest.mark.parametrize("white", [1.0, 255.0, 65_535.0])
def test_floating_point_pixels_are_scaled_and_non_finite_ones_are_black(white: float) -> None:
    values = (GREY[..., 0] / 255 * white).astype(np.float32)
    values[0, :3] = np.nan, -np.inf, np.inf
    rgb = decode_image(bad_images.encoded(Image.fromarray(values), "TIFF")).rgb
    assert mean_error(rgb[1:], GREY[1:]) < 1
    assert rgb[0, :3, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("high", [255, 4095, 65_535, 2**31 - 1])
def test_32_bit_samples_are_scaled(high: int) -> None:
    values = (GREY[..., 0].astype(np.float64) / 255 * high).astype(np.int32)
    values[0, 0] = high
    data = bad_images.encoded(Image.fromarray(values), "TIFF")
    assert mean_error(decode_image(data).rgb, GREY) < 1


def test_16_bit_grey_with_white_at_zero_is_not_inverted() -> None:
    values = 65_535 - GREY[..., 0].astype(np.uint16) * 257
    data = bad_images.encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert mean_error(decode_image(data).rgb, GREY) < 1


def test_lab_is_converted() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(bad_images.gradient_rgb()), to_lab)
    assert mean_error(decode_image(bad_images.encoded(lab, "TIFF")).rgb, bad_images.gradient_rgb()) < 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_tiff_mode_has_the_right_colours(mode: str) -> None:
    picture = Image.fromarray(bad_images.gradient_rgb()).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    assert mean_error(decode_image(bad_images.encoded(picture, "TIFF")).rgb, expected) < 3


def test_a_bmp_whose_alpha_is_all_zero_is_opaque() -> None:
    for alpha in (0, 255):
        assert (decode_image(bad_images.bmp_32_bit(alpha)).rgb == bad_images.gradient_rgb()).all()
    assert mean_error(decode_image(bad_images.bmp_32_bit(1)).rgb, np.full((80, 120, 3), 255)) < 2


def test_a_tiff_whose_alpha_is_all_zero_is_opaque() -> None:
    picture = Image.fromarray(bad_images.gradient_rgb()).convert("RGBA")
    picture.putalpha(0)
    assert (decode_image(bad_images.encoded(picture, "TIFF")).rgb == bad_images.gradient_rgb()).all()


def test_a_transparent_colour_of_a_16_bit_png_becomes_white() -> None:
    values = np.full((4, 8, 1), 65_535 // 4, np.uint16)
    values[:, :4], values[0, 0] = 1_000, 65_535
    data = bad_images.png_samples(values, bad_images.png_chunk(b"tRNS", struct.pack(">H", 1_000)))
    assert decode_image(data).rgb[1, :, 0].tolist() == [255] * 4 + [64] * 4


def test_large_images_are_converted_in_bands_without_seams() -> None:
    picture = Image.fromarray(bad_images.gradient_rgb(3_001, 2_003)).convert("RGBA")
    data = bad_images.encoded(picture, "PNG", compress_level=1)
    assert mean_error(decode_image(data).rgb, bad_images.gradient_rgb(3_001, 2_003)) == 0
    assert mean_error(decode_image(data, max_side_px=500).rgb, bad_images.gradient_rgb(500, 334)) < 3


def test_equal_reasons_have_equal_messages() -> None:
    broken = [bad_images.jpeg(number, 80)[:-number] for number in (100, 200, 300)]
    broken_pngs = [bad_images.with_png_chunks()[:number] for number in (300, 500)]
    large = [bad_images.jpeg(number, 80) for number in (200, 300)]
    messages = []
    for files, limits in (
        (broken, {}),
        (broken_pngs, {}),
        (large, {"max_pixels": 10_000}),
        (large, {"max_bytes": 100}),
    ):
        of_kind = []
        for data in files:
            with pytest.raises(ImageError) as caught:
                decode_image(data, **limits)
            of_kind.append(str(caught.value))
        messages.append(of_kind)
    assert messages == [
        ["JPEG: truncated"] * 3,
        ["PNG: truncated"] * 2,
        ["JPEG: more than 10000 pixels to decode"] * 2,
        ["the file has more than 100 bytes"] * 2,
    ]


def test_the_pixel_limit_applies_to_decoded_pixels() -> None:
    baseline = bad_images.large_jpeg()
    progressive = bad_images.encoded(Image.fromarray(bad_images.gradient_rgb(2_400, 1_800)), "JPEG", progressive=True)
    assert decode_image(baseline, max_side_px=300, max_pixels=300 * 225).width_px == 2_400
    assert status_of(baseline, max_side_px=300, max_pixels=300 * 225 - 1) is Status.TOO_LARGE
    assert status_of(baseline, max_pixels=1_000_000) is Status.TOO_LARGE
    assert status_of(progressive, max_side_px=300, max_pixels=1_000_000) is Status.TOO_LARGE
    assert decode_image(progressive, max_side_px=300, max_pixels=2_400 * 1_800).width_px == 2_400


def test_a_pixel_limit_above_pillows_applies() -> None:
    bomb = bad_images.png_bomb(20_000)
    assert status_of(bomb) is Status.TOO_LARGE
    image = decode_image(bomb, max_pixels=400_000_000, max_side_px=100)
    assert (image.width_px, image.rgb.max()) == (20_000, 0)


def test_a_progressive_jpeg_with_too_many_scans_is_rejected() -> None:
    data = bad_images.encoded(Image.fromarray(bad_images.gradient_rgb()), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="more than 200 scans"):
        decode_image(data[:-2] + data[last:-2] * 300 + data[-2:])


def test_reserved_bytes_of_a_bmp_do_not_matter() -> None:
    data = bad_images.encoded(Image.fromarray(bad_images.gradient_rgb()), "BMP")
    assert (decode_image(data[:6] + b"GIMP" + data[10:]).rgb == bad_images.gradient_rgb()).all()
    assert status_of(b"BMW is a maker of cars, and this is no photograph of one.") is Status.NOT_AN_IMAGE


def test_a_heic_with_an_unnamed_item_does_not_crash_its_process() -> None:
    data = bad_images.heic("turned_by_exif").replace(b"Exif", b"Exi\xff", 1)
    assert status_of(data) is Status.UNREADABLE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("cannot read <_io.BytesIO object at 0x7f00aa>"), "cannot read"),
        (OSError("image file is truncated (12 bytes not processed)"), "truncated"),
        (OSError("Image size 12x277 exceeds 0xFF"), "Image size NxN exceeds N"),
        (SyntaxError("broken file (chunk b'\\x00\\x01')"), "broken file"),
        (KeyError(258), "KeyError: N"),
        (struct.error(), "error"),
    ],
)
def test_messages_contain_nothing_specific_to_a_file(error: Exception, expected: str) -> None:
    assert decode._reason(error) == expected


@pytest.mark.parametrize("size", [(1, 1), (33, 21), (2600, 1800)], ids=str)  # Pillow keeps the last in two blocks
def test_pixels_are_exactly_those_of_a_lossless_file(size: tuple[int, int]) -> None:
    width, height = size
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(rgb).save(data, "BMP")

    decoded = decode_image(data.getvalue())

    assert decoded.rgb.flags.c_contiguous
    assert (decoded.rgb == rgb).all()
