"""Training augmentation: stored crops to the network's input. `models.transform.prepare_eval` does this unchanged.

All geometry is one affine map and one `grid_sample`; all colour changes are one 3 x 3 matrix and offset per image.
Shrinking is always anti-aliased: if the template in the stored crop is larger than the input, the crop is first shrunk
with a filter, and `grid_sample` then works at about 1:1. Images are uint8 NCHW, in any memory format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from agr_ray.config import AugmentConfig
from agr_ray.models.network_input import LUMA, centre, equalize_luminance, normalise, resize
from agr_ray.models.transform import Transform

_LEAST_RESOLUTION = 0.25
_MOST_NOISE = 0.2
_ERASED_SHARE = (0.02, 0.20)
_ERASED_ASPECT = (0.3, 3.3)


def augment(images_u8: Tensor, transform: Transform, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Prepare images as `prepare_eval` does, with random changes drawn for each image.

    Beyond the stored crop, the image is reflected at its border.

    Args:
        images_u8: (n, 3, stored, stored) uint8, RGB.
        transform: of the network.
        config: kinds and strengths of the changes.
        generator: on any device; the same state gives the same images. Noise also depends on the images' device.

    Returns:
        (n, 3, image_size, image_size) float32.
    """
    if transform.equalize:
        images_u8 = equalize_luminance(images_u8)
    if config.randaugment_ops:
        from agr_ray.learn.randaugment import rand_augment  # imports torchvision, which takes a second

        images_u8 = rand_augment(images_u8, config.randaugment_ops, config.randaugment_magnitude, generator)
    flip = _uniform(images_u8, 0.0, 1.0, generator) < config.flip_probability
    if config.rotation_degrees or config.scale or config.shift:
        images = _resample(images_u8, flip, transform, config, generator)
    else:
        plain = centre(images_u8, transform)
        images = torch.where(flip[:, None, None, None], plain.flip(-1), plain)
    if config.brightness or config.contrast or config.saturation:
        images = _jitter(images, config, generator)
    if config.low_resolution_probability:
        images = _lower_resolution(images, config.low_resolution_probability, generator)
    if config.noise_probability:
        images = _add_noise(images, config.noise_probability, generator)
    images = normalise(images, transform)
    if config.erasing_probability:
        images = _erase(images, config.erasing_probability, generator)
    return images


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw a float32 for each image on the generator's device, and move them to the images' device."""
    draws = torch.rand(like.shape[0], generator=generator, device=generator.device)
    return (low + (high - low) * draws).to(like.device)


def _resample(
    images_u8: Tensor, flip: Tensor, transform: Transform, config: AugmentConfig, generator: torch.Generator
) -> Tensor:
    """Flip, rotate, zoom, shift, cut out the template and resize, all in one interpolation."""
    angle = torch.deg2rad(_uniform(images_u8, -config.rotation_degrees, config.rotation_degrees, generator))
    zoom = _uniform(images_u8, 1.0 - config.scale, 1.0 + config.scale, generator)
    shift_x = _uniform(images_u8, -config.shift, config.shift, generator)
    shift_y = _uniform(images_u8, -config.shift, config.shift, generator)
    stored, side = images_u8.shape[-1], transform.crop_side_px
    assert images_u8.shape[-2] == stored >= side, (images_u8.shape, side)
    share = side / stored
    if side > transform.image_size:
        images = resize(images_u8, round(stored * transform.image_size / side))
    else:
        # Contiguous NCHW: grid_sample and the steps after it take half as long as with channels_last.
        images = images_u8.to(torch.float32, memory_format=torch.contiguous_format)
    # From output to input, both in -1..1: flip, then rotate and zoom about the centre, then shift.
    cosine, sine = share / zoom * angle.cos(), share / zoom * angle.sin()
    mirror = 1.0 - 2.0 * flip.float()
    rows = (cosine * mirror, -sine, 2.0 * share * shift_x, sine * mirror, cosine, 2.0 * share * shift_y)
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    size = [len(images), 3, transform.image_size, transform.image_size]
    grid = F.affine_grid(theta, size, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _jitter(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Scale brightness, then saturation about each pixel's grey, then contrast about the image's mean grey.

    The three together are linear, so they are applied as one matrix and clamped once.
    """
    brightness = _uniform(images, 1.0 - config.brightness, 1.0 + config.brightness, generator)
    contrast = _uniform(images, 1.0 - config.contrast, 1.0 + config.contrast, generator)
    saturation = _uniform(images, 1.0 - config.saturation, 1.0 + config.saturation, generator)
    images = images.float()
    luma = torch.tensor(LUMA, device=images.device)
    mean_grey = images.mean(dim=(2, 3)) @ luma
    own = brightness * contrast * saturation
    grey = brightness * contrast * (1.0 - saturation)
    matrix = own[:, None, None] * torch.eye(3, device=images.device) + grey[:, None, None] * luma.expand(3, 3)
    offset = brightness * (1.0 - contrast) * mean_grey
    changed = torch.baddbmm(offset[:, None, None].expand(-1, 3, 1), matrix, images.flatten(2))
    return changed.clamp_(0.0, 255.0).view(images.shape)


def _lower_resolution(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Shrink some images with a filter, and enlarge them again; one factor for the whole batch."""
    chosen = _draw_rows(images, probability, generator)
    factor = torch.empty(1, device=generator.device).uniform_(_LEAST_RESOLUTION, 1.0, generator=generator).item()
    side = images.shape[-1]
    few_pixels = resize(images[chosen], max(1, round(side * factor)))
    enlarged = F.interpolate(few_pixels, size=(side, side), mode="bilinear", align_corners=False)
    return images.float().index_copy(0, chosen, enlarged)


def _add_noise(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to some images, in each pixel and channel, with a standard deviation drawn for each image."""
    chosen = _draw_rows(images, probability, generator)
    sigma = 255.0 * _uniform(images, 0.0, _MOST_NOISE, generator)[chosen]
    # Millions of numbers: drawn where the images are.
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    on_device = torch.Generator(images.device).manual_seed(seed)
    clean = images.float()[chosen]
    noise = torch.randn(clean.shape, generator=on_device, device=images.device)
    return images.float().index_copy(0, chosen, (clean + sigma[:, None, None, None] * noise).clamp_(0.0, 255.0))


def _draw_rows(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return the indices of the images that a draw chooses; their number is known without waiting for a GPU."""
    draws = torch.rand(len(images), generator=generator, device=generator.device)
    return (draws < probability).nonzero()[:, 0].to(images.device)


def _erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Fill a rectangle with the image's mean colour."""
    chosen = _uniform(images, 0.0, 1.0, generator) < probability
    share = _uniform(images, *_ERASED_SHARE, generator)
    low, high = (torch.tensor(aspect).log().item() for aspect in _ERASED_ASPECT)
    aspect = _uniform(images, low, high, generator).exp()
    inside = chosen[:, None, None]
    for dim, length in ((1, (share * aspect).sqrt()), (2, (share / aspect).sqrt())):
        first = _uniform(images, 0.0, 1.0, generator) * (1.0 - length.clamp(max=1.0))
        num = images.shape[dim + 1]
        centres = (torch.arange(num, device=images.device) + 0.5) / num
        within = (centres >= first[:, None]) & (centres < (first + length)[:, None])
        inside = inside & within.unsqueeze(3 - dim)
    return torch.where(inside[:, None], images.mean(dim=(2, 3), keepdim=True), images)
