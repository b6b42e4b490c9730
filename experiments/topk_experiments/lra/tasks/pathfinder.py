"""Pathfinder (Linsley et al. 2018): are the two circles at the ends of one dashed curve?

An image holds two long dashed curves and several short distractors, none of them close to another. One circle marks an
end of a long curve. A second circle marks the other end of the same curve (label 1) or an end of the other long curve
(label 0). The distance of the circles carries no information: for each image with label 1 there is one with label 0
whose circles are as far apart, and images without such a counterpart are dropped. (The published generator leaves this
shortcut in.) The place of the circles still carries a little: two curves with a circle each take more room than one,
which may lie at the border. The model reads the grey pixels row by row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits, make_in_shards, shares_right_by

Point = tuple[float, float]

# Tries for a dash, a distractor and a second long curve before the curve, or the whole image, is drawn anew.
_DASH_TRIES = 8
_DISTRACTOR_TRIES = 8
_SEED_TRIES = 50
# Closeness is checked between points on the curves, so many pixels apart.
_SPACING = 0.5
# Two images are counterparts if the distances of their circles fall into the same interval. A long curve has so many
# intervals. On short curves most distances are nearly the largest possible: with intervals ten times as wide, the
# distance within an interval gave away the label of 56 to 59 % of the images whose curves have two dashes.
_INTERVALS = 140
# Rings around the middle of an image, for the guess from the place of the circles.
_ZONES = 16


class Drawing(NamedTuple):
    """The content of an image.

    curves   corners of each dashed curve; the two long ones first
    circles  centres of the two circles
    label    1 if the circles lie at the two ends of one curve, otherwise 0
    """

    curves: list[list[Point]]
    circles: tuple[Point, Point]
    label: int


@dataclass(frozen=True)
class Pathfinder:
    """Random images, half of them with label 1.

    The defaults draw 32 x 32 images with long curves of 14 dashes: the published sizes of the hard third of the task,
    to which published accuracies belong. Long curves of 6 and 9 dashes are the easy and the intermediate third. For
    128 x 128 images every length must be given too, in pixels.

    resolution          pixels along each side
    contour_length      dashes of a long curve
    distractor_length   dashes of a short curve
    num_distractors     short curves; fewer if there is no room
    dash_length         in pixels, along the curve
    gap                 between two dashes, in pixels
    thickness           of a dash, in pixels
    contrast            brightness of a pixel that a dash covers, cut off at 1
    continuity          how straight curves are: at 1 a dash may turn by up to 90 degrees, at 2 by up to 45
    seed_distance       between the first ends of the long curves, in pixels
    circle_radius       in pixels
    clearance           least distance of any two curves, in pixels between centre lines; at low resolutions the faint
                        edges of close curves still meet
    padding             pixels at the border that no curve enters
    grey_levels         number of shades, black and white included; 256 as published
    """

    num_train: int = 160_000
    num_validation: int = 20_000
    num_test: int = 20_000
    resolution: int = 32
    contour_length: int = 14
    distractor_length: int = 4
    num_distractors: int = 5
    dash_length: float = 2.0
    gap: float = 1.5
    thickness: float = 0.5
    contrast: float = 1.5
    continuity: float = 1.0
    seed_distance: float = 7.0
    circle_radius: float = 1.5
    clearance: float = 2.0
    padding: int = 1
    grey_levels: int = 256
    seed: int = 0

    name = "pathfinder"
    version = 2
    num_classes = 2
    vocabulary = 256
    parts = 1

    def __post_init__(self) -> None:
        for field in ("resolution", "contour_length", "distractor_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.continuity < 1:
            raise ValueError(f"continuity must be at least 1, got {self.continuity}")
        if not 2 <= self.grey_levels <= 256:
            raise ValueError(f"grey_levels must be 2 to 256, got {self.grey_levels}")
        if self.clearance <= max(self.thickness, self.gap):
            raise ValueError(
                "clearance must be above thickness and gap, or curves are as close as the dashes of one, got "
                f"{self.clearance}, {self.thickness} and {self.gap}"
            )

    @property
    def max_length(self) -> int:
        """Pixels of an image."""
        return self.resolution**2

    def make(self, progress: Progress) -> Splits:
        """All three splits; shards of earlier, interrupted calls are used."""
        counts = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        return make_in_shards(self._add_shard, counts, self.seed, progress)

    def baselines(self, splits: Splits) -> dict[str, dict[str, float]]:
        """Accuracies of guesses without a model.

        "by where the circles lie": the label that is more frequent in training at this distance between the middle of
        the image and the point between the circles, without a look at any curve. Left out if curves may be white or a
        circle may lack a white pixel.
        """
        levels = self.grey_levels - 1
        if round(levels * self.contrast) >= levels or self.circle_radius < 0.5 + math.sqrt(0.5):
            return {}
        shares = shares_right_by(self._zones_of_circles, _ZONES, self.num_classes, splits)
        return {"by where the circles lie": shares}

    def _zones_of_circles(self, examples: Examples) -> np.ndarray:
        """For each image the ring, one of _ZONES around its middle, with the mean of all white pixels, int64 [N]."""
        places = np.arange(self.resolution) + 0.5 - self.resolution / 2
        zones = []
        for number in examples.sequences[:, 0]:  # one at a time: all images together may take gigabytes
            white = examples.sequence(number).reshape(self.resolution, self.resolution) == 255
            from_middle = math.hypot(white.sum(0) @ places, white.sum(1) @ places) / white.sum()
            zones.append(min(int(from_middle / (self.resolution / 2) * _ZONES), _ZONES - 1))
        return np.array(zones, dtype=np.int64)

    def _add_shard(self, random: Random, count: int, writer: ExamplesWriter) -> None:
        for drawing in itertools.islice(self.draw(random), count):
            writer.add([self.render(drawing)], drawing.label)

    def draw(self, random: Random) -> Iterator[Drawing]:
        """Drawings without end, in pairs of both labels with equal distances of the circles."""
        waiting: dict[tuple[int, int], list[Drawing]] = {}  # (label, interval of the distance)
        interval = self.contour_length * (self.dash_length + self.gap) / _INTERVALS
        while True:
            drawing = self.draw_one(random)
            place = int(math.dist(*drawing.circles) / interval)
            counterparts = waiting.get((1 - drawing.label, place))
            if not counterparts:
                waiting.setdefault((drawing.label, place), []).append(drawing)
                continue
            pair = [drawing, counterparts.pop()]
            random.shuffle(pair)
            yield from pair

    def draw_one(self, random: Random) -> Drawing:
        """One drawing; the distance of its circles may give away its label."""
        while True:
            paper = _Paper(self, random)
            long_curves = paper.two_long_curves()
            if long_curves is None:
                continue
            for _ in range(self.num_distractors):
                for _ in range(_DISTRACTOR_TRIES):
                    if paper.short_curve():
                        break
            label, marked = random.getrandbits(1), random.getrandbits(1)
            first, second = long_curves[marked], long_curves[marked if label else 1 - marked]
            return Drawing(paper.curves, (first[0], second[-1]), label)

    def render(self, drawing: Drawing, *, dashed: bool = True, circles: bool = True) -> np.ndarray:
        """Grey pixels, uint8 [resolution, resolution].

        dashed   whether curves have gaps
        circles  whether to draw the circles
        """
        segments = []
        for curve in drawing.curves:
            for begin, end in itertools.pairwise(curve):
                share = 0.5 * self.gap / (self.dash_length + self.gap) if dashed else 0.0
                segments.append((_between(begin, end, share), _between(begin, end, 1 - share)))
        pixels = (np.arange(self.resolution) + 0.5).astype(np.float32)
        ends = np.array(segments, dtype=np.float32)  # [S, 2, 2]: begin and end, across and down
        across = pixels[None, None, :] - ends[:, 0, 0, None, None]  # [S, 1, R]
        down = pixels[None, :, None] - ends[:, 0, 1, None, None]  # [S, R, 1]
        along = (ends[:, 1] - ends[:, 0])[:, :, None, None]  # [S, 2, 1, 1]
        length = np.maximum((along**2).sum(1), 1e-12)
        nearest = np.clip((across * along[:, 0] + down * along[:, 1]) / length, 0, 1)
        distances = np.hypot(across - nearest * along[:, 0], down - nearest * along[:, 1]).min(0)
        image = np.minimum(1, self.contrast * np.clip(0.5 + self.thickness / 2 - distances, 0, 1))
        for x, y in drawing.circles if circles else ():
            distances = np.hypot(pixels[None, :] - x, pixels[:, None] - y)
            image = np.maximum(image, np.clip(0.5 + self.circle_radius - distances, 0, 1))
        steps = self.grey_levels - 1
        return np.rint(np.rint(steps * image) * (255 / steps)).astype(np.uint8)


class _Paper:
    """An image while its curves are drawn."""

    def __init__(self, task: Pathfinder, random: Random) -> None:
        self.task = task
        self.random = random
        self.curves: list[list[Point]] = []
        self._step = task.dash_length + task.gap
        # So many points at the end of a curve are always too close to its next dash, and are not checked.
        self._own_end = math.ceil((task.clearance + self._step) / _SPACING)

    def two_long_curves(self) -> tuple[list[Point], list[Point]] | None:
        """Two curves that grow in turns from seeds at the set distance; None if one of them cannot grow."""
        first = self._seed(self._anywhere(), [])
        if first is None:
            return None
        second = None
        for _ in range(_SEED_TRIES):
            angle = self.random.uniform(-math.pi, math.pi)
            begin = _moved(first.corners[0], angle, self.task.seed_distance)
            second = self._seed(begin, [first.points])
            if second is not None:
                break
        if second is None:
            return None
        for _ in range(self.task.contour_length - 1):
            if not self._extend(first, [second.points]) or not self._extend(second, [first.points]):
                return None
        self.curves = [first.corners, second.corners]
        self._points = [first.points, second.points]
        return first.corners, second.corners

    def short_curve(self) -> bool:
        """Try to add a distractor at a random place; False if there is no room."""
        curve = self._seed(self._anywhere(), self._points)
        if curve is None:
            return False
        for _ in range(self.task.distractor_length - 1):
            if not self._extend(curve, self._points):
                return False
        self.curves.append(curve.corners)
        self._points.append(curve.points)
        return True

    def _anywhere(self) -> Point:
        low, high = float(self.task.padding), float(self.task.resolution - self.task.padding)
        return self.random.uniform(low, high), self.random.uniform(low, high)

    def _seed(self, begin: Point, others: list[np.ndarray]) -> _Curve | None:
        """A curve of one dash."""
        angle = self.random.uniform(-math.pi, math.pi)
        end = _moved(begin, angle, self._step)
        points = _points_on(begin, end)
        if not (self._inside(begin) and self._inside(end) and self._is_free(points, others)):
            return None
        return _Curve([begin, end], angle, points)

    def _extend(self, curve: _Curve, others: list[np.ndarray]) -> bool:
        """Add a dash that turns by at most what `continuity` allows; False if there is no room."""
        for _ in range(_DASH_TRIES):
            angle = curve.angle + self._turn()
            end = _moved(curve.corners[-1], angle, self._step)
            if not self._inside(end):
                continue
            points = _points_on(curve.corners[-1], end)
            if self._is_free(points, [*others, curve.points[: -self._own_end]]):
                curve.corners.append(end)
                curve.angle = angle
                curve.points = np.concatenate([curve.points, points])
                return True
        return False

    def _turn(self) -> float:
        """A random angle. Its density is the squared cosine of continuity x angle, up to where that is 0."""
        widest = 0.5 * math.pi / self.task.continuity
        while True:
            angle = self.random.uniform(-widest, widest)
            if self.random.random() < math.cos(self.task.continuity * angle) ** 2:
                return angle

    def _inside(self, point: Point) -> bool:
        low, high = self.task.padding, self.task.resolution - self.task.padding
        return low <= point[0] <= high and low <= point[1] <= high

    def _is_free(self, points: np.ndarray, others: list[np.ndarray]) -> bool:
        """Whether no other curve is closer than the clearance."""
        for other in others:
            if len(other):
                apart = points[:, None] - other[None]
                if (apart.real**2 + apart.imag**2).min() < self.task.clearance**2:
                    return False
        return True


class _Curve:
    """A curve: its corners so far, the angle of its last dash, and close points on it as complex numbers."""

    def __init__(self, corners: list[Point], angle: float, points: np.ndarray) -> None:
        self.corners = corners
        self.angle = angle
        self.points = points


def _points_on(begin: Point, end: Point) -> np.ndarray:
    number = math.ceil(math.dist(begin, end) / _SPACING) + 1
    return np.linspace(complex(*begin), complex(*end), number)


def _moved(point: Point, angle: float, distance: float) -> Point:
    return point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)


def _between(begin: Point, end: Point, share: float) -> Point:
    return begin[0] + share * (end[0] - begin[0]), begin[1] + share * (end[1] - begin[1])
