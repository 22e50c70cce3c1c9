"""The hair of a rendered head."""

from __future__ import annotations

import cv2
import numpy as np

from agr_ray.data.rendered.canvas import Canvas, Roi, smooth_curve
from agr_ray.data.rendered.traits import RenderedArray, Traits


class Hair:
    """The hair of a head: a part behind the face and a part in front, of one texture."""

    def __init__(self, canvas: Canvas, traits: Traits, rng: np.random.Generator) -> None:
        self._canvas = canvas
        self._traits = traits
        curl = min(traits.curl, 1.0)
        phase, part = rng.uniform(0, 6.28), rng.uniform(-0.4, 0.4)
        wave = (0.10 * curl * np.sin(canvas.y * (6 + 6 * curl) + phase)).astype(np.float32)
        spread = (1.0 - 0.22 * np.clip(-canvas.y, 0, 1.3)).astype(np.float32)  # strands fan out from the crown
        strands = rng.standard_normal(512).astype(np.float32)
        strands = np.convolve(strands, np.array([0.25, 0.5, 0.25], np.float32), "same") * 1.5
        where = ((canvas.x - np.float32(part)) * (48 / spread)[:, None]) + (48 * wave + 256)[:, None]
        straight = strands.take(where.astype(np.int32), mode="clip")
        self._rough = 0.75 * canvas.noise(0.07) + 0.5 * canvas.noise(0.03)
        weight = curl**1.5
        texture = cv2.addWeighted(straight, 1 - weight, self._rough, 1.4 * weight, 0)
        texture += ((1.6 * (1 - curl)) * np.exp(-(((canvas.y + 0.9) / 0.16) ** 2)))[:, None]
        # The texture, -6 to 6, picks from a table of colours: light and dark strands, and single grey ones.
        depth = np.linspace(-6, 6, 256)
        grey = traits.greyness * (1 - traits.greyness) * np.maximum(-depth, 0)
        codes = cv2.convertScaleAbs(texture, alpha=255 / 12, beta=127.5)
        colour = np.empty_like(canvas.rgb)
        for plane, hair in zip(colour, traits.hair, strict=True):
            table = np.clip((1 + 0.16 * depth) * hair + 0.02 * depth + grey * (0.8 - hair), 0, 1)
            cv2.LUT(codes, table.astype(np.float32), dst=plane)
        self._colour = colour
        fade = np.exp(-((canvas.x / 0.75) ** 2))[None, :] * np.clip(-canvas.y / 0.45, 0, 1)[:, None]
        self._density = 1 - np.float32(traits.thinning) * fade

    def draw_back(self) -> None:
        """Draw the hair around the head, from the crown down to its length."""
        traits = self._traits
        width, volume = traits.face_width, traits.hair_volume
        end = traits.hair_length
        side = 0.93 * width + volume
        right = [(0.70 * width + 0.6 * volume, -1.15), (0.9 * width + 0.9 * volume, -0.6), (side, -0.1)]
        if end > 0.3:
            flare = 0.06 * min(end, 1.5)
            right += [(side + flare, 0.5 * end), (side + flare, end - 0.1), (side - 0.25, end + 0.05), (0.5, end)]
        else:
            right += [(0.85 * width, end + 0.35)]
        left = [(-x, y) for x, y in reversed(right)]
        outline = smooth_curve([(0.0, -1.30 - 0.7 * volume), *right, *left], closed=True)
        self._paint(*self._canvas.fill(outline, 0.03), 0.75)

    def draw_front(self) -> None:
        """Draw the hair over the skull down to the hair line, the sideburns and locks over the ears."""
        traits = self._traits
        width, volume = traits.face_width, traits.hair_volume
        line, recess = traits.hairline_y, traits.temple_recession
        out = 0.93 * width + volume
        hairline = [
            (0.87 * width, -0.32),
            (0.74 * width, -0.48 - 0.5 * recess),
            (0.42 * width, line - recess),
            (0.0, line),
        ]
        inner = [(-x, y) for x, y in hairline] + hairline[::-1][1:]
        top = [(0.9 * width + 0.8 * volume, -0.6), (0.70 * width + 0.5 * volume, -1.12), (0.0, -1.28 - 0.6 * volume)]
        outer = top + [(-x, y) for x, y in top[::-1][1:]]
        shape = smooth_curve([*inner, *outer], closed=True)
        self._paint(*self._canvas.fill(shape, 0.025), 1.0)
        end = max(traits.hair_length, -0.25)
        for sign in (-1, 1):
            inside = 0.90 * width - 0.05 * min(max(end, 0.0), 1.0)
            if end > 0.25:
                lock = [(inside, -0.45), (inside + 0.02, 0.0), (inside + 0.03, 0.5 * end), (inside + 0.1, end)]
                lock += [(out, end), (out + 0.05, 0.5 * end), (out, -0.1), (out - 0.05, -0.6)]
            else:
                lock = [(0.86 * width, -0.45), (0.91 * width, 0.1 + end), (0.99 * width, 0.1 + end), (out - 0.03, -0.2)]
                lock += [(out - 0.06, -0.6)]
            points = smooth_curve(lock, closed=True)
            points[:, 0] *= sign
            self._paint(*self._canvas.fill(points, 0.025), 1.0)

    def _paint(self, roi: Roi, alpha: RenderedArray, light: float) -> None:
        ragged = 0.10 + 0.35 * min(self._traits.curl, 1.0)
        edge = alpha + ragged * self._rough[roi] * (4 * alpha * (1 - alpha))
        alpha = np.clip((edge - 0.5) * 1.6 + 0.5, 0, 1) * self._density[roi]
        self._canvas.paint(roi, alpha, self._colour[:, *roi] * np.float32(light))
