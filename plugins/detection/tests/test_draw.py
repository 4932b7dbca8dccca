"""Pictures: a frame of the class's colour where the box is, a label beside it, eight of them on a sheet."""

import itertools

import numpy as np
import pytest
from PIL import Image

from fasttune_detection.draw import as_image, colour, draw, sheet

PAPER = (200, 200, 200)


def paper(width=400, height=300):
    return Image.new("RGB", (width, height), PAPER)


def where(image, ink):
    """left, top, right, bottom of what has this colour, exactly."""
    rows, columns = np.nonzero((np.asarray(image) == ink).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_frame_is_where_the_box_is_and_of_its_colour():
    image = paper()
    drawn = draw(image, [[50, 60, 200, 180]], ["dog"], None, classes=["cat", "dog"])
    assert drawn.size == image.size
    pixels = np.asarray(drawn)
    for y, x in ((60, 120), (179, 120), (120, 50), (120, 199)):
        assert tuple(pixels[y, x]) == colour(1)
    assert (pixels[62:178, 52:198] == PAPER).all()  # nothing but the frame, two pixels wide
    left, _, right, bottom = where(drawn, colour(1))
    assert (left, right, bottom) == (50, 200, 180)
    assert (np.asarray(image) == PAPER).all()


def test_a_label_is_legible():
    """White letters on the dark red of the first class, above the box."""
    black = Image.new("RGB", (400, 300))
    drawn = np.asarray(draw(black, [[50, 60, 200, 180]], ["dog"], [0.87]))
    label = drawn[40:60, 50:140]
    ground = (label == colour(0)).all(-1)
    letters = label.min(-1) > 140
    assert ground.mean() > 0.3
    assert 0.03 < letters.mean() < 0.5
    assert letters.any(0).sum() > 25  # they are spread out: "dog 0.87"
    assert not np.array_equal(drawn, np.asarray(draw(black, [[50, 60, 200, 180]], ["dog"], [0.12])))


CORNERS = [(0, 0, 400, 300), (0, 0, 30, 10), (390, 0, 400, 300), (0, 290, 400, 300), (1, 1, 2, 2)]


@pytest.mark.parametrize(
    "box", [(0, 0, 400, 300), (0, 0, 30, 10), (390, 0, 400, 300), (0, 290, 400, 300), (1, 1, 2, 2)]
)
def test_labels_at_the_edges_are_drawn_whole(box):
    wide = where(draw(paper(), [[100, 100, 101, 101]], ["zebra"], [0.5]), colour(0))
    label = (wide[2] - wide[0], wide[3] - wide[1] - 1)
    found = np.asarray(draw(paper(), [box], ["zebra"], [0.5]))
    changed = (found != PAPER).any(-1).sum()
    frame = (np.asarray(draw(paper(), [box], [""], None)) != PAPER).any(-1).sum()
    assert changed > 0.75 * label[0] * label[1]
    assert frame < 300 * 400


def test_labels_do_not_cover_each_other():
    drawn = draw(paper(), [[50, 60, 200, 180], [52, 61, 201, 181]], ["cat", "dog"], [0.5, 0.6])
    one = draw(paper(), [[50, 60, 200, 180]], ["cat"], [0.5], classes=["cat", "dog"])
    label = (slice(40, 58), slice(50, 120))
    assert np.array_equal(np.asarray(drawn)[label], np.asarray(one)[label])
    pixels = np.asarray(drawn)
    assert (pixels == colour(1)).all(-1).sum() > 2 * (149 + 120) * 2 + 300  # more than its frame: a label too


def test_names_of_any_length():
    for name in ("", " ", "a", "x" * 300, "two\nlines", "Straße", "猫"):
        for size in ((400, 300), (30, 40), (300, 20)):
            draw(paper(*size), [[1, 1, 20, 15]], [name], [0.5])
    one, other = (
        np.asarray(draw(paper(256, 256), [[100, 100, 120, 120]], ["x" * 300], [score])) for score in (0.99, 0.11)
    )
    changed = np.nonzero((one != other).any((0, 2)))[0]
    assert changed.min() > 200  # the name is cut, and the score still stands at its end
    assert changed.max() < 255


def test_a_class_keeps_its_colour():
    classes = ["bird", "cat", "dog"]
    for labels in (["dog"], ["bird", "dog"], ["dog", "cat", "bird"]):
        boxes = [[20 + 120 * i, 60, 100 + 120 * i, 180] for i in range(len(labels))]
        pixels = np.asarray(draw(paper(), boxes, labels, None, classes))
        for box, label in zip(boxes, labels, strict=True):
            assert tuple(pixels[120, box[0]]) == colour(classes.index(label))


def test_colours_are_distinct():
    def distance(one, other):
        return np.linalg.norm(np.subtract(one, other))

    assert min(distance(*pair) for pair in itertools.combinations(map(colour, range(12)), 2)) > 50
    assert len({colour(i) for i in range(80)}) == 80
    assert all(max(colour(i)) > 150 for i in range(80))  # none is lost on black


def test_no_boxes_and_lengths_that_differ():
    assert np.array_equal(np.asarray(draw(paper(), [], [], [])), np.asarray(paper()))
    with pytest.raises(ValueError, match="zip"):
        draw(paper(), [[1, 2, 3, 4]], ["a", "b"], None)


def test_numpy_and_other_modes():
    gray = Image.new("L", (300, 300), 200)
    drawn = draw(gray, np.float32([[50, 60, 200, 180]]), ("a",), np.float32([0.5]))
    assert drawn.mode == "RGB"
    assert tuple(np.asarray(drawn)[120, 50]) == colour(0)


def test_small_pictures_are_enlarged():
    drawn = draw(paper(50, 40), [[10, 20, 30, 38]], ["a"], None)
    assert drawn.size == (250, 200)
    left, _, right, bottom = where(drawn, colour(0))
    assert (left, right, bottom) == (50, 150, 190)


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (11, 4, 2)]
)
def test_sheet(count, columns, rows):
    images = [Image.new("RGB", (60, 40), (10 * i + 5, 250, 0)) for i in range(count)]
    page = sheet(images)
    assert page.size == (columns * 68 + 8, rows * 48 + 8)
    for i in range(min(count, 8)):
        x, y = i % 4 * 68 + 8, i // 4 * 48 + 8
        cell = np.asarray(page)[y : y + 40, x : x + 60]
        assert (cell == (10 * i + 5, 250, 0)).all()
    assert not (np.asarray(page) == (85, 250, 0)).all(-1).any()  # the ninth


def test_a_sheet_of_unlike_and_large_images():
    page = sheet([paper(2000, 1000), paper(100, 900), paper(7, 5)])
    assert page.size == (3 * 488 + 8, 480 + 16)
    assert (np.asarray(page)[8 : 8 + 240, 8 : 8 + 480] == PAPER).all()
    with pytest.raises(ValueError, match="an image"):
        sheet([])


@pytest.mark.parametrize(("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0, 0, 0), (1, 1, 1))])
def test_what_the_model_sees_becomes_a_picture_again(mean, std):
    shades = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    values = ((shades / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(np.asarray(as_image(values, mean, std)), shades)
    beyond = as_image(np.full((3, 2, 2), 9, np.float32), mean, std)  # interpolation may overshoot
    assert beyond.getextrema() == ((255, 255),) * 3
