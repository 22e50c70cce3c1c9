"""Decoding: every kind of photograph comes out upright and right, every bad file with its status."""

import io
import pickle
import tracemalloc
import warnings
from contextlib import suppress

import bad_images
import numpy as np
import pytest
from PIL import Image

from agr_ray.schema import Status
from agr_ray.vision.decode import ImageError, decode_crop, decode_image, encode_jpeg


def mean_error(rgb: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(rgb.astype(float) - expected.astype(float)).mean())


def status_of(data: bytes, **limits: int) -> Status:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **limits)
    assert "\n" not in str(caught.value)
    return caught.value.status


@pytest.mark.parametrize("data", [bad_images.empty(), bad_images.text()])
def test_what_is_no_image_is_not_an_image(data: bytes) -> None:
    assert status_of(data) is Status.NOT_AN_IMAGE


def test_an_image_of_a_format_that_is_not_read_is_not_an_image() -> None:
    assert status_of(bad_images.encoded(Image.new("RGB", (4, 4)), "PPM")) is Status.NOT_AN_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        bad_images.corrupt_jpeg(),
        bad_images.corrupt_png(),
        bad_images.truncated_jpeg(),
        *(bad_images.truncated(name) for name in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")),
    ],
)
def test_a_broken_image_is_unreadable(data: bytes) -> None:
    assert status_of(data) is Status.UNREADABLE


def test_no_bytes_that_begin_like_an_image_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(bad_images.gradient_rgb(32, 24))
    for format_name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        sound = bad_images.encoded(picture, format_name)
        for _ in range(100):
            data = bytearray(sound)
            for position in rng.integers(0, len(data), 6):
                data[position] = rng.integers(0, 256)
            with suppress(ImageError):
                decode_image(bytes(data), max_pixels=1_000_000)


def test_a_bomb_is_refused_without_being_decoded() -> None:
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
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    image = decode_image(bad_images.oriented_jpeg(orientation))
    assert (image.width_px, image.height_px) == (120, 80)
    assert mean_error(image.rgb, bad_images.gradient_rgb()) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_tiff_orientation_comes_out_upright(orientation: int) -> None:
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
def test_transparency_is_laid_on_white(data: bytes, left: tuple[int, int, int]) -> None:
    rgb = decode_image(data).rgb
    assert tuple(rgb[20, 10]) == left
    assert tuple(rgb[20, 50]) == (255, 255, 255)


def test_grey_has_three_equal_channels() -> None:
    rgb = decode_image(bad_images.grey_jpeg()).rgb
    assert rgb.shape == (80, 120, 3)
    assert (rgb[..., 0] == rgb[..., 2]).all()


def test_of_an_animation_the_first_frame_is_taken() -> None:
    assert tuple(decode_image(bad_images.animated_gif()).rgb[10, 10]) == (255, 0, 0)


@pytest.mark.parametrize("max_side_px", [300, 999, 2_399])
def test_the_longer_side_is_bounded_exactly(max_side_px: int) -> None:
    image = decode_image(bad_images.large_jpeg(), max_side_px=max_side_px)
    assert max(image.rgb.shape[:2]) == max_side_px
    assert (image.width_px, image.height_px) == (2_400, 1_800)
    assert image.scale == pytest.approx(2_400 / max_side_px)
    assert image.rgb.flags.c_contiguous


def test_a_shrunk_jpeg_shows_the_same_picture() -> None:
    rgb = decode_image(bad_images.large_jpeg(), max_side_px=500).rgb
    assert mean_error(rgb, bad_images.gradient_rgb(500, 375)) < 3


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


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Status.TOO_LARGE, "too\nlarge")))
    assert (error.status, str(error)) == (Status.TOO_LARGE, "too large")
