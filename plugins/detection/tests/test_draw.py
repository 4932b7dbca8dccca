"""Pictures: a frame of the class's colour where the box is, a label beside it, eight of them on a sheet."""

import itertools

import numpy as np
import pytest
from PIL import Image

from fasttune_detection.draw import as_image, colour, draw, draw_segments, sheet

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


@pytest.mark.parametrize("size", [(1, 1), (5000, 4), (4, 5000), (600, 9)])
def test_flat_pictures_have_no_room_for_labels(size):
    """A box at their far end."""
    width, height = size
    box = [width * 0.9, height * 0.9, width, height]
    drawn = draw(paper(*size), [box, box], ["zebra", "ox"], [0.5, 0.25])
    assert (np.asarray(drawn) != PAPER).any()
    masks = [np.ones((height, width), bool)] * 2
    assert (np.asarray(draw_segments(paper(*size), masks, ["zebra", "ox"], [0.5, 0.25])) != PAPER).any()


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
    assert drawn.size == (450, 360)
    left, _, right, bottom = where(drawn, colour(0))
    assert (left, right, bottom) == (90, 270, 342)


def disc(x, y, radius, size=(600, 400)):
    """bool [h, w]"""
    rows, columns = np.mgrid[: size[1], : size[0]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def veiled(ink):
    return np.round(0.55 * np.array(PAPER) + 0.45 * np.array(ink))


def test_segments_are_veiled_and_outlined_in_the_colour_of_their_class():
    image = paper(600, 400)
    mask = disc(300, 200, 150)
    drawn = draw_segments(image, [mask], ["dog"], None, classes=["cat", "dog"])
    pixels = np.asarray(drawn)
    assert drawn.size == image.size
    assert (pixels[~mask] == PAPER).all()
    assert np.abs(pixels[120, 300] - veiled(colour(1))).max() <= 1
    for x, y in ((150, 200), (151, 200), (450, 200), (300, 50), (300, 350)):
        assert tuple(pixels[y, x]) == colour(1)  # the outline, two pixels wide, sharp
    assert np.abs(pixels[200, 152] - veiled(colour(1))).max() <= 1
    label = (pixels == colour(1)).all(-1) & disc(300, 200, 140)
    rows, columns = np.nonzero(label)
    assert abs(rows.mean() - 200) < 3  # in the middle of the segment
    assert abs(columns.mean() - 300) < 6
    assert (np.asarray(image) == PAPER).all()


def test_segments_of_one_class_are_told_apart_by_their_outlines():
    left, right = np.zeros((2, 400, 600), bool)
    left[100:300, 100:300], right[100:300, 300:500] = True, True
    apart = np.asarray(draw_segments(paper(600, 400), [left, right], ["a", "a"], None))
    joined = np.asarray(draw_segments(paper(600, 400), [left | right], ["a"], None))
    assert (apart[120:130, 298:302] == colour(0)).all()
    assert (np.abs(joined[120:130, 298:302] - veiled(colour(0))) <= 1).all()


def test_small_segments_lie_above_large_ones_whatever_the_order():
    masks, labels = [disc(300, 200, 40), disc(300, 200, 180)], ["a", "b"]
    one = draw_segments(paper(600, 400), masks, labels, [0.9, 0.8])
    other = draw_segments(paper(600, 400), masks[::-1], labels[::-1], [0.8, 0.9])
    assert np.array_equal(np.asarray(one), np.asarray(other))
    assert tuple(np.asarray(one)[200, 339]) == colour(0)  # its outline


def test_the_label_of_a_small_segment_has_the_first_choice():
    """The centre of both is the same."""
    masks = [disc(300, 200, 180), disc(300, 200, 50)]
    drawn = np.asarray(draw_segments(paper(600, 400), masks, ["b", "a"], None, ["a", "b"]))
    inside = drawn[196:205, 297:304]
    assert (inside == colour(0)).all(-1).mean() > 0.3
    assert not (inside == colour(1)).all(-1).any()


def test_a_label_stands_in_the_largest_part():
    mask = disc(80, 80, 60) | disc(450, 250, 120)
    drawn = np.asarray(draw_segments(paper(600, 400), [mask], ["a"], None))
    label = (drawn == colour(0)).all(-1) & (disc(450, 250, 100) | disc(80, 80, 50))
    assert label[200:300, 400:500].sum() == label.sum() > 50


def test_labels_of_small_segments_stand_beside_them():
    drawn = np.asarray(draw_segments(paper(600, 400), [disc(300, 200, 6)], ["elephant"], [0.5]))
    assert np.abs(drawn[200, 300] - veiled(colour(0))).max() <= 1
    changed = (drawn != PAPER).any(-1) & ~disc(300, 200, 6)
    assert changed.sum() > 500
    assert abs(np.nonzero(changed)[0] - 200).max() < 40


def test_labels_of_segments_do_not_cover_each_other():
    masks = [disc(300, 200, radius) for radius in (100, 104, 108)]
    three = np.asarray(draw_segments(paper(600, 400), masks, ["a", "b", "c"], None, ["a", "b", "c"]))
    inside = disc(300, 200, 95)
    for i in range(3):  # a label of one letter has 10 x 15 pixels and more
        assert ((three == colour(i)).all(-1) & inside).sum() > 80


def test_segments_at_the_frame_have_no_outline_along_it():
    mask = np.zeros((400, 600), bool)
    mask[:, :300] = True
    drawn = np.asarray(draw_segments(paper(600, 400), [mask], ["a"], None))
    assert np.abs(drawn[0, 100] - veiled(colour(0))).max() <= 1
    assert (drawn[50:350, 298:300] == colour(0)).all()


def test_segments_without_pixels_or_names_and_of_small_pictures():
    nothing = np.zeros((40, 60), bool)
    assert draw_segments(paper(60, 40), [], [], None).size == (480, 320)
    blank = np.asarray(draw_segments(paper(60, 40), [nothing], ["a"], [0.5]))
    assert (blank == PAPER).all()
    mask = nothing.copy()
    mask[10:30, 20:50] = True
    drawn = draw_segments(paper(60, 40), [mask], ["a" * 300], [None])
    assert drawn.size == (480, 320)
    changed = (np.asarray(drawn) != PAPER).any(-1)
    assert changed[80:240, 160:400].all()
    for name in ("", " ", "two\nlines", "猫"):
        draw_segments(paper(60, 40), [mask, np.ones_like(mask)], [name, "b"], [0.5, 0.25])
    draw_segments(paper(3, 900), [np.ones((900, 3), bool)], ["a long name"], [0.5])


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="60 x 40"):
        draw_segments(paper(40, 60), [np.zeros((40, 60), bool)], ["a"], None)
    with pytest.raises(ValueError, match="zip"):
        draw_segments(paper(60, 40), [np.zeros((40, 60), bool)], ["a"], [0.1, 0.2])


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
