import itertools
import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from topk_experiments.lra.configuration import read_config
from topk_experiments.lra.tasks import Pathfinder

KINDS = {
    "published, 32": Pathfinder(),
    "easy, 32": Pathfinder(contour_length=6, distractor_length=2, num_distractors=10),
    "published, 128": Pathfinder(
        resolution=128,
        num_distractors=8,
        dash_length=5.0,
        gap=5.0,
        thickness=1.5,
        contrast=0.9,
        continuity=1.8,
        seed_distance=20.0,
        circle_radius=3.0,
        clearance=6.0,
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def drawings(request):
    task = KINDS[request.param]
    random = Random(f"drawings of {request.param}")
    return task, [task.draw_one(random) for _ in range(8 if task.resolution > 32 else 40)]


def reachable(ink, start):
    """All pixels with ink that are connected to a pixel, over edges and corners."""
    reached, pending = {start}, [start]
    while pending:
        row, column = pending.pop()
        for neighbour in ((row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
            if neighbour not in reached and all(0 <= place < len(ink) for place in neighbour) and ink[neighbour]:
                reached.add(neighbour)
                pending.append(neighbour)
    return reached


def pixel(point, resolution):
    column, row = (min(resolution - 1, int(coordinate)) for coordinate in point)
    return row, column


def apart(first, second):
    """Smallest distance between two polylines, from points a quarter of a pixel apart."""

    def points(curve):
        pieces = [
            np.linspace(begin, end, 2 + int(4 * math.dist(begin, end))) for begin, end in itertools.pairwise(curve)
        ]
        return np.concatenate(pieces)

    a, b = points(first), points(second)
    return np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)).min()


def enlarged(task, drawing, factor):
    """The same drawing on paper with more pixels, where curves that keep their distance do not share any."""
    lengths = (
        "resolution",
        "dash_length",
        "gap",
        "thickness",
        "seed_distance",
        "circle_radius",
        "clearance",
        "padding",
    )
    larger = replace(task, **{name: factor * getattr(task, name) for name in lengths})
    curves = [[(factor * x, factor * y) for x, y in curve] for curve in drawing.curves]
    return larger, drawing._replace(curves=curves, circles=tuple((factor * x, factor * y) for x, y in drawing.circles))


def test_a_path_of_ink_joins_the_circles_exactly_where_the_label_is_1(drawings):
    for drawing in drawings[1]:
        task, drawing = enlarged(drawings[0], drawing, 4 if drawings[0].resolution == 32 else 1)
        ink = task.render(drawing, dashed=False, circles=False) > 0
        ends = [pixel(circle, task.resolution) for circle in drawing.circles]
        assert all(ink[end] for end in ends)
        assert (ends[1] in reachable(ink, ends[0])) == bool(drawing.label)


def test_curves_keep_their_distance_and_stay_inside(drawings):
    task, drawn = drawings
    for drawing in drawn[:5]:
        for number, curve in enumerate(drawing.curves):
            inside = [task.padding - 1e-9 <= x <= task.resolution - task.padding + 1e-9 for p in curve for x in p]
            assert all(inside)
            for other in drawing.curves[:number]:
                # Closeness is checked at points half a pixel apart.
                assert apart(curve, other) >= math.sqrt(task.clearance**2 - 0.25**2) - 0.01


def test_curves_have_the_dashes_and_turns_that_are_asked_for(drawings):
    task, drawn = drawings
    for drawing in drawn:
        lengths = [len(curve) - 1 for curve in drawing.curves]
        assert lengths[:2] == [task.contour_length] * 2
        assert set(lengths[2:]) <= {task.distractor_length}
        assert len(lengths) <= 2 + task.num_distractors
        for curve in drawing.curves:
            steps = [complex(x - a, y - b) for (a, b), (x, y) in itertools.pairwise(curve)]
            assert np.abs(steps) == pytest.approx(task.dash_length + task.gap)
            turns = [abs(np.angle(after / before)) for before, after in itertools.pairwise(steps)]
            assert max(turns) <= math.pi / 2 / task.continuity + 1e-9
        assert math.dist(drawing.curves[0][0], drawing.curves[1][0]) == pytest.approx(task.seed_distance)


def test_dashes_leave_gaps_and_circles_shine(drawings):
    task, drawn = drawings
    for drawing in drawn[:10]:
        image = task.render(drawing)
        assert image.shape == (task.resolution, task.resolution)
        assert image.dtype == np.uint8
        assert image.astype(int).sum() < task.render(drawing, dashed=False).astype(int).sum()
        for circle in drawing.circles:
            assert image[pixel(circle, task.resolution)] > 200


def test_both_labels_and_both_curves_come_up():
    task = KINDS["easy, 32"]
    drawn = list(itertools.islice(task.draw(Random(7)), 300))
    assert np.mean([drawing.label for drawing in drawn]) == 0.5
    firsts = [drawing.circles[0] == drawing.curves[0][0] for drawing in drawn]
    assert 0.4 < np.mean(firsts) < 0.6


def best_share_by_distance(drawn, width=1.0):
    """Accuracy of choosing the more frequent label of each interval of distance, on the drawings it is counted on."""
    counts = {}
    for drawing in drawn:
        counts.setdefault(int(math.dist(*drawing.circles) / width), [0, 0])[drawing.label] += 1
    return sum(map(max, counts.values())) / len(drawn)


def test_the_distance_of_the_circles_does_not_tell_the_label():
    task = KINDS["easy, 32"]
    random = Random(8)
    assert best_share_by_distance([task.draw_one(random) for _ in range(400)]) > 0.6
    # One more of a label than of the other in each of about 25 intervals is what cutting distances at other places
    # than the generator does leaves.
    assert best_share_by_distance(list(itertools.islice(task.draw(random), 400))) < 0.54
    assert best_share_by_distance(list(itertools.islice(task.draw(random), 400)), width=0.45) == 0.5


def test_the_distance_does_not_tell_the_label_of_short_curves_either():
    """With two dashes the distances of label 1 crowd where the curve is straight: within a pixel labels differ."""
    task = read_config("pathfinder-small").new_task(None)
    random = Random(9)
    assert best_share_by_distance([task.draw_one(random) for _ in range(300)], width=0.3) > 0.7
    assert best_share_by_distance(list(itertools.islice(task.draw(random), 1200)), width=0.3) < 0.54


def test_distractors_come_as_often_as_there_is_room():
    task = replace(KINDS["easy, 32"], num_distractors=3)
    assert [len(task.draw_one(Random(seed)).curves) for seed in range(10)].count(5) >= 8


def test_a_seed_gives_the_same_image_again():
    task = KINDS["easy, 32"]
    first, again, other = (task.render(task.draw_one(Random(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_shades_are_as_many_as_asked_for_and_evenly_spaced():
    task = replace(KINDS["easy, 32"], grey_levels=4)
    image = task.render(task.draw_one(Random(3)))
    assert np.unique(image).tolist() == [0, 85, 170, 255]
    full = replace(task, grey_levels=256).render(task.draw_one(Random(3)))
    assert np.abs(image.astype(int) - full).max() <= 43


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"contour_length": 0}, "contour_length must be at least 1, got 0"),
        ({"continuity": 0.5}, "continuity must be at least 1, got 0.5"),
        ({"grey_levels": 1}, "grey_levels must be 2 to 256, got 1"),
        ({"clearance": 1.5}, r"clearance must be above thickness and gap, .* got 1.5, 0.5 and 1.5"),
    ],
)
def test_settings_that_make_no_image_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Pathfinder(**settings)
