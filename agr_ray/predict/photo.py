"""The result of `FaceModel.predict`: a photograph with its faces and their attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from agr_ray.schema import Status

if TYPE_CHECKING:
    from PIL import Image

    from agr_ray.vision.decode import DecodedImage

_COLOUR: Final = (0, 200, 90)
_FLAGGED: Final = (230, 140, 0)


@dataclass(frozen=True)
class Face:
    """One face. Boxes and landmarks are in pixels of the upright photograph (EXIF orientation applied)."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    detector_score: float
    """MTCNN: probability of a face. Haar: the cascade's weight, mostly 3 to 12."""
    landmarks: tuple[tuple[float, float], ...] | None
    """x, y of the left eye, right eye, nose, left and right corner of the mouth, as the viewer sees them. None, like
    the head pose, if the detector gives none."""
    yaw: float | None
    """Degrees; positive turns towards the viewer's right."""
    pitch: float | None
    """Degrees; positive looks up."""
    roll: float | None
    """Degrees; positive is clockwise as the viewer sees it."""
    sharpness: float
    """Variance of the Laplacian of the aligned face."""
    age: float | None
    """Years. None, like gender and race, if the model does not predict it."""
    age_interval: tuple[float, float] | None
    """Years. None: the model is not calibrated in age."""
    gender: str | None
    """The likelier class; None if the model is too uncertain to tell (see `abstain`)."""
    p_male: float | None
    """Probability of "male", calibrated if the model is."""
    race: str | None
    """The likeliest class; None if the model is too uncertain to tell (see `abstain`)."""
    race_probs: Mapping[str, float] | None
    """Probability of each class, calibrated if the model is."""
    abstain: tuple[str, ...]
    """Those of gender and race that the model is too uncertain to tell."""
    flags: tuple[str, ...]
    """Reasons not to trust this face (schema.FLAGS): small, blurred, turned, unsure."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Face:
        """Read a row of schema.FACE, which may lack columns."""
        points, low, probs = row.get("landmarks"), row.get("age_low"), row.get("race_probs")
        abstain = tuple(row.get("abstain") or ())
        return cls(
            box=tuple(row["box"]),
            detector_score=row["detector_score"],
            landmarks=None if points is None else tuple(zip(points[::2], points[1::2], strict=True)),
            yaw=row.get("yaw"),
            pitch=row.get("pitch"),
            roll=row.get("roll"),
            sharpness=row["sharpness"],
            age=row.get("age"),
            age_interval=None if low is None else (low, row["age_high"]),
            gender=None if "gender" in abstain else row.get("gender"),
            p_male=row.get("p_male"),
            race=None if "race" in abstain else row.get("race"),
            race_probs=None if probs is None or None in dict(probs).values() else dict(probs),
            abstain=abstain,
            flags=tuple(row["flags"]),
        )

    @property
    def label(self) -> str:
        """Return the attributes as text, such as `34 (27-41), female, black`; `race ?` if the model abstains on it."""
        words = []
        if self.age is not None:
            interval = "" if self.age_interval is None else " ({:.0f}-{:.0f})".format(*self.age_interval)
            words.append(f"{self.age:.0f}{interval}")
        for attribute in ("gender", "race"):
            value = getattr(self, attribute)
            if value is not None or attribute in self.abstain:
                words.append(value or f"{attribute} ?")
        return ", ".join(words)


@dataclass(frozen=True)
class Photo:
    """One photograph and its faces, or why it has none."""

    source: str
    """Path or URI; empty for bytes, images and arrays."""
    status: Status
    """`ok`; `no_face`; or why the image could not be read, as in a scoring run: `unreadable`, `too_large`,
    `not_an_image`, `missing`, `failed`, ..."""
    error: str | None
    """Why it could not be read, in one line; None if it was."""
    width_px: int | None
    """Of the upright photograph; None if it was not decoded."""
    height_px: int | None
    """Of the upright photograph; None if it was not decoded."""
    rotation_degrees: int | None
    """Clockwise rotation in which the faces were found; always 0 without `vision.try_rotations`. None if it was not
    decoded."""
    faces: tuple[Face, ...]
    """From left to right."""
    _open: Callable[[], DecodedImage] = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Return a line for the photograph and a line for each face."""
        heading = f"{self.source or 'image'}: {self.status}" + (f": {self.error}" if self.error else "")
        boxes = ((face, ", ".join(f"{each:.0f}" for each in face.box)) for face in self.faces)
        return "\n".join([heading, *(f"  box ({box}): {face.label}" for face, box in boxes)])

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with `faces` as a list."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        return values | {"faces": [asdict(face) for face in self.faces]}

    def draw(self) -> Image.Image:
        """Return the upright photograph with boxes, landmarks and labels, as a PIL image in RGB.

        The photograph is read again, and shrunk to a longer side of 4,096 pixels if it is larger. Flagged faces are
        orange, others green. If there are several, their labels begin with their numbers, from 1.

        Raises:
            ImageError: the photograph can't be read, or no longer.
        """
        from PIL import Image, ImageDraw, ImageFont

        decoded = self._open()
        image = Image.fromarray(decoded.rgb)
        pen = ImageDraw.Draw(image)
        width = max(2, max(image.size) // 400)
        for number, face in enumerate(self.faces, start=1):
            colour = _FLAGGED if face.flags else _COLOUR
            x0, y0, x1, y1 = (each / decoded.scale for each in face.box)
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=width)
            for x, y in face.landmarks or ():
                x, y = x / decoded.scale, y / decoded.scale
                pen.ellipse((x - width, y - width, x + width, y + width), fill=colour)
            font = ImageFont.load_default(size=min(max(12.0, 0.13 * (x1 - x0)), 0.04 * max(image.size)))
            of_several = f"{number}: " if len(self.faces) > 1 else ""
            text = of_several + "\n".join(face.label.split(", "))
            left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font=font)
            # Below the box, but never outside the photograph.
            x = min(max(x0, 0.0), max(image.width - (right - left) - 2 * width, 0.0))
            y = min(y1, max(image.height - (bottom - top) - 2 * width, 0.0))
            pen.rectangle((x, y, x + right - left + 2 * width, y + bottom - top + 2 * width), fill=colour)
            pen.multiline_text((x + width - left, y + width - top), text, fill=(0, 0, 0), font=font)
        return image
