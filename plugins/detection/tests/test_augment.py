"""What is drawn into a picture is where its box says, whatever was done to both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pydantic import ValidationError

from fasttune_detection.augment import (
    MOVES,
    AugmentOptions,
    Move,
    augment,
    draw_crop,
    draw_scale,
    recoloured,
)
from fasttune_detection.boxes import Objects
from fasttune_detection.segments import Segments

OFF = {"flip": 0, "scale": None, "crop": 0, "colour": 0}
ONLY = {
    "flip": {"flip": 1.0},
    "enlarge": {"scale": (1.3, 3)},
    "shrink": {"scale": (0.2, 0.9)},
    "crop": {"crop": 1.0, "crop_side": 0.3},
    "colour": {"colour": 1.0},
    "everything": {"flip": 0.5, "scale": (0.4, 2.5), "crop": 0.7, "crop_side": 0.4, "colour": 0.8},
}
BACKGROUND, INK = (20, 40, 60), (250, 120, 30)


def only(kind):
    return AugmentOptions(**{**OFF, **ONLY[kind]})


def some(boxes, labels=None, crowd=None):
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    labels = tuple(labels or (f"object {i}" for i in range(len(boxes))))
    return Objects(boxes, labels, np.asarray(crowd if crowd is not None else [False] * len(boxes), dtype=bool))


def painted(size, boxes):
    """A picture whose rectangles are exactly the boxes: whole pixels [x1, x2), [y1, y2)."""
    image = Image.new("RGB", size, BACKGROUND)
    for x1, y1, x2, y2 in boxes:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=INK)
    return image


def ink(image):
    """bool [height, width]: nearer to the ink than to what is around it, whatever the colours became."""
    values = np.asarray(image, dtype=np.float64)
    warmth = values[..., 0] - values[..., 2]  # 220 of the ink, -40 of the background, 20 of the frame's fill
    return warmth >= (warmth.min() + warmth.max()) / 2


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def random_boxes(rng, size, count):
    corner = np.floor(rng.uniform(0, 0.8, (count, 2)) * size)
    sides = np.maximum(1, np.floor(rng.uniform(0.02, 0.6, (count, 2)) * size))
    return np.hstack([corner, np.minimum(corner + sides, size)])


@pytest.mark.parametrize("kind", ONLY)
def test_a_box_surrounds_what_was_painted(kind):
    kept = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = (int(rng.integers(40, 260)), int(rng.integers(40, 260)))
        x1, y1 = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        box = (x1, y1, rng.integers(x1 + 10, size[0] + 1), rng.integers(y1 + 10, size[1] + 1))
        image, objects = augment(painted(size, [box]), some([box]), rng, only(kind))
        assert image.size == size
        if kind == "shrink" or not len(objects):
            continue
        kept += 1
        rows, columns = np.nonzero(ink(image))
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, objects.boxes[0], atol=1.01, err_msg=f"{kind}, {seed}")
    assert kept >= 55 or kind == "shrink"


@pytest.mark.parametrize("seed", range(40))
def test_a_box_surrounds_what_was_painted_and_made_smaller(seed):
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(200, 400)), int(rng.integers(200, 400)))
    box = (60, 50, int(rng.integers(130, size[0] - 20)), int(rng.integers(130, size[1] - 20)))
    image, objects = augment(painted(size, [box]), some([box]), rng, only("shrink"))
    # The frame around a smaller picture has a colour of its own; only the picture's ink is orange.
    rows, columns = np.nonzero(ink(image))
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(found, objects.boxes[0], atol=1.01)
    shrunk = (objects.boxes[0, 2:] - objects.boxes[0, :2]) / (np.array(box[2:]) - box[:2])
    assert (shrunk < 0.92).all()
    assert shrunk[0] == pytest.approx(shrunk[1], rel=0.03)  # its sides are whole pixels: no exact factor


@pytest.mark.parametrize("kind", ONLY)
def test_boxes_stay_inside_and_labels_follow_them(kind):
    """Each object has colour, label and flag of its own: found again by its colour."""
    seen = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = np.array([rng.integers(60, 200), rng.integers(60, 200)])
        boxes = random_boxes(rng, size, 6)
        objects = some(boxes, [str(i) for i in range(6)], [i % 3 == 0 for i in range(6)])
        _, after = augment(noise(tuple(size.tolist())), objects, rng, only(kind))
        assert after.boxes.dtype == np.float32
        assert (after.boxes >= 0).all()
        assert (after.boxes <= np.tile(size, 2)).all()
        assert (after.boxes[:, 2:] > after.boxes[:, :2]).all()
        assert after.crowd.tolist() == [int(label) % 3 == 0 for label in after.labels]
        assert [*after.labels] == sorted(after.labels)  # none twice, and in order
        seen += len(after)
    assert seen > 40


def test_labels_follow_by_place():
    """Three boxes of unlike sizes: after a crop every label is still on the box of its own aspect."""
    objects = some([(10, 10, 90, 20), (20, 40, 30, 90), (60, 50, 100, 90)], ["wide", "tall", "square"])
    checked = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        move = draw_crop((120, 100), objects, rng, only("crop"))
        after = move.objects(objects)
        for label, box in zip(after.labels, after.boxes, strict=True):
            expected = move.boxes(objects.boxes[[objects.labels.index(label)]])[0]
            np.testing.assert_allclose(box, np.clip(expected, 0, [120, 100] * 2), rtol=1e-6)
            checked.add(label)
    assert checked == {"wide", "tall", "square"}


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (640, 427)])
def test_flipping_twice_is_the_identity(size):
    rng = np.random.default_rng(3)
    boxes = np.sort(rng.uniform(0, 1, (9, 2, 2)), axis=1).reshape(9, 4) * np.tile(size, 2)
    image, objects = noise(size), some(boxes)
    once = augment(image, objects, rng, only("flip"))
    assert size == (1, 1) or np.asarray(once[0]).tolist() != np.asarray(image).tolist()
    twice = augment(*once, rng, only("flip"))
    assert np.array_equal(np.asarray(twice[0]), np.asarray(image))
    # width - x rounds to float32's spacing at the width, and so does the way back
    np.testing.assert_allclose(twice[1].boxes, objects.boxes, rtol=0, atol=2 * np.spacing(np.float32(max(size))))
    assert twice[1].labels == objects.labels


def test_flip_by_hand():
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    after, objects = augment(image, some([(0, 0, 1, 2)]), np.random.default_rng(0), only("flip"))
    assert np.asarray(after).tolist() == np.asarray(image)[:, ::-1].tolist()
    assert objects.boxes.tolist() == [[2, 0, 3, 2]]


def test_equal_generators_give_equal_results():
    image, objects = noise((90, 70)), some(random_boxes(np.random.default_rng(1), np.array([90, 70]), 5))
    results = set()
    for seed in range(12):
        one, two = (augment(image, objects, np.random.default_rng(seed), only("everything")) for _ in range(2))
        assert one[0].tobytes() == two[0].tobytes()
        assert one[1].boxes.tobytes() == two[1].boxes.tobytes()
        assert one[1].labels == two[1].labels
        results.add(one[0].tobytes())
    assert len(results) == 12


def test_nothing_changes_its_input():
    image, objects = noise((90, 70)), some([(5, 5, 60, 60)])
    before = image.tobytes(), objects.boxes.tobytes()
    for seed in range(10):
        augment(image, objects, np.random.default_rng(seed), only("everything"))
    assert (image.tobytes(), objects.boxes.tobytes()) == before


def test_all_of_it_can_be_turned_off():
    image, objects = noise((90, 70)), some([(5, 5, 60, 60)])
    after, same = augment(image, objects, np.random.default_rng(0), AugmentOptions(**OFF))
    assert after.tobytes() == image.tobytes()
    assert same.boxes.tolist() == objects.boxes.tolist()


@pytest.mark.parametrize("kind", ["flip", "crop", "colour"])
def test_a_share_is_a_share(kind):
    """At probability 0.3 about that many pictures are changed."""
    options = AugmentOptions(**{**OFF, kind: 0.3})
    image, objects = noise((30, 30)), some([(5, 5, 25, 25)])
    share = 1 - 0.7**4 if kind == "colour" else 0.3  # four draws of colour a picture
    changed = sum(
        augment(image, objects, np.random.default_rng(seed), options)[0].tobytes() != image.tobytes()
        for seed in range(400)
    )
    assert changed / 400 == pytest.approx(share, abs=0.08)  # three standard deviations


@pytest.mark.parametrize("draw", [draw_crop, draw_scale])
def test_a_window_keeps_objects(draw):
    """The only object is in the corner, and still in every window; a crowd beside it does not count."""
    options = AugmentOptions(**{**OFF, "crop": 1.0, "crop_side": 0.3, "scale": (1.5, 3)})
    objects = some([(90, 90, 99, 99), (0, 0, 40, 40)], crowd=[False, True])
    drawn = 0
    for seed in range(80):
        move = draw((100, 100), objects, np.random.default_rng(seed), options)
        if move is not None:
            drawn += 1
            after = move.objects(objects)
            assert "object 0" in after.labels
    assert drawn > 25  # else the picture is left whole: fifty windows missed it


def test_a_window_shows_enough_of_what_it_keeps():
    objects = some([(0, 0, 100, 30), (40, 60, 60, 100)])
    options = AugmentOptions(**{**OFF, "crop": 1.0, "crop_side": 0.2})
    for seed in range(80):
        move = draw_crop((100, 100), objects, np.random.default_rng(seed), options)
        after = move.objects(objects)
        x1, y1, x2, y2 = move.window
        for label, box in zip(after.labels, after.boxes, strict=True):
            whole = objects.boxes[objects.labels.index(label)]
            scale = (100 / (x2 - x1)) * (100 / (y2 - y1))
            share = np.prod(box[2:] - box[:2]) / np.prod(whole[2:] - whole[:2]) / scale
            assert share >= 0.3 - 1e-3


def test_a_box_goes_when_its_centre_does():
    move = Move((100, 100), (50.0, 0.0, 100.0, 100.0), (0, 0, 100, 100))
    objects = some([(0, 0, 98, 10), (2, 20, 99, 30), (60, 40, 70, 50)], ["out", "in", "whole"])
    after = move.objects(objects)
    assert after.labels == ("in", "whole")
    np.testing.assert_allclose(after.boxes, [[0, 20, 98, 30], [20, 40, 40, 50]], rtol=1e-6)


def test_what_is_shrunk_below_a_pixel_goes_but_small_ones_may_be_mirrored():
    objects = some([(10, 10, 11.5, 30), (10, 10, 30, 30), (5.2, 5.2, 5.9, 9)])
    smaller = Move((100, 100), (0, 0, 100, 100), (0, 0, 50, 50))
    assert smaller.objects(objects).labels == ("object 1",)
    mirrored = Move((100, 100), (0, 0, 100, 100), (0, 0, 100, 100), mirrored=True)
    assert len(mirrored.objects(objects)) == 3


@pytest.mark.parametrize("kind", ONLY)
def test_images_without_objects(kind):
    for seed in range(10):
        image, objects = augment(noise((50, 40)), some([]), np.random.default_rng(seed), only(kind))
        assert image.size == (50, 40)
        assert objects.boxes.shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5000, 3)])
def test_odd_sizes(size):
    for seed in range(10):
        image, _ = augment(noise(size), some([(0, 0, *size)]), np.random.default_rng(seed), only("everything"))
        assert image.size == size


def test_a_mask_moves_along():
    """Nearest values and a fill of its own: the mask of a box is where the box is, to a pixel."""
    size, box = (150, 120), (30, 40, 110, 100)
    mask = Image.fromarray(np.zeros(size[::-1], dtype=np.uint8))
    ImageDraw.Draw(mask).rectangle((30, 40, 109, 99), fill=7)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        objects, moved = some([box]), mask
        for draw in MOVES:
            move = draw(size, objects, rng, only("everything"))
            if move is not None:
                moved = move.image(moved, 255, Image.Resampling.NEAREST)
                objects = move.objects(objects)
        values = np.asarray(moved)
        assert set(np.unique(values)) <= {0, 7, 255}
        if len(objects):
            rows, columns = np.nonzero(values == 7)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found, objects.boxes[0], atol=2.01)  # nearest twice: up to a pixel each


def segments_of(masks, labels=None, *, things=True, crowd=None):
    masks = np.asarray(masks)
    count = len(masks)
    flags = np.asarray(crowd if crowd is not None else [False] * count, dtype=bool)
    labels = tuple(labels or (f"segment {i}" for i in range(count)))
    return Segments(masks, labels, flags, np.full(count, things), ~masks.any(0))


@pytest.mark.parametrize("kind", ONLY)
def test_segments_move_as_pillows_nearest_neighbour_does(kind):
    """Segments are the ids of a picture, which is moved by Pillow."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        size = tuple(int(side) for side in rng.integers(20, 150, 2))
        ids = np.kron(rng.integers(0, 6, (4, 5)), np.ones((40, 40)))[: size[1], : size[0]].astype(np.uint8)
        segments = segments_of([ids == i for i in range(1, 6)], "abcde", things=seed % 2 == 0)
        segments = segments.take(segments.masks.any((1, 2)))
        moved, after = Image.fromarray(ids), segments
        for draw in MOVES:
            move = draw(size, after, rng, only(kind))
            if move is not None:
                moved, after = move.image(moved, 0, Image.Resampling.NEAREST), move.segments(after)
        values = np.asarray(moved)
        assert after.masks.dtype == after.void.dtype == bool
        assert after.masks.flags.c_contiguous
        assert after.labels == tuple(label for i, label in enumerate("abcde", start=1) if (values == i).any())
        for label, mask in zip(after.labels, after.masks, strict=True):
            # Pillow adds its steps up: where a middle lies between two pixels, it may round the other way
            assert (mask != (values == "abcde".index(label) + 1)).mean() < 0.02, f"{kind}, {seed}"
        assert (after.void != (values == 0)).mean() < 0.02


def test_segments_move_with_the_image():
    for seed in range(40):
        x1, y1, x2, y2 = box = (30, 20, 110, 90)
        mask = np.zeros((120, 160), dtype=bool)
        mask[y1:y2, x1:x2] = True
        segments = segments_of([mask])
        image, after = augment(
            painted((160, 120), [box]), segments, np.random.default_rng(seed), only("everything")
        )
        assert after.masks.shape == (len(after), 120, 160)
        if len(after):  # the edge of the ink is blurred, by a pixel a step
            assert ((ink(image) & ~after.void) != after.masks[0]).mean() < 0.03, seed
        assert (mask == segments.masks[0]).all()


def test_a_segment_goes_with_its_last_pixel_and_its_area_is_counted_anew():
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, :, :3], masks[1, :, 8:] = True, True
    segments = replace(segments_of(masks, ["a", "b"], crowd=[True, False]), stated=np.array([7.0, 8.0]))
    after = Move((10, 10), (2.0, 0.0, 7.0, 10.0), (0, 0, 10, 10)).segments(segments)
    assert (after.labels, after.crowd.tolist(), after.areas.tolist()) == (("a",), [True], [20])
    smaller = Move((10, 10), (0, 0, 10, 10), (5, 0, 10, 5), mirrored=True).segments(segments)
    assert smaller.labels == ("a", "b")
    assert smaller.void[:5, 5:].all()
    assert smaller.void[5:].all()


def test_a_window_shows_truth():
    """Enough of a thing, of any but a crowd; where there are no things, any pixel will do."""
    options = AugmentOptions(**{**OFF, "crop": 1.0, "crop_side": 0.3})
    masks = np.zeros((2, 100, 100), dtype=bool)
    masks[0, 88:98, 88:98], masks[1, :40, :40] = True, True
    drawn = 0
    for seed in range(60):
        move = draw_crop((100, 100), segments_of(masks, crowd=[False, True]), np.random.default_rng(seed), options)
        if move is not None:
            x1, y1, x2, y2 = move.window
            share = max(0, min(98, x2) - max(88, x1)) * max(0, min(98, y2) - max(88, y1)) / 100
            assert share > 0.1  # 0.3 in whole pixels, of ten
            drawn += 1
        semantic = segments_of(masks[:1], things=False)
        move = draw_crop((100, 100), semantic, np.random.default_rng(seed), options)
        assert move is None or len(move.segments(semantic))
    assert drawn > 25
    nothing = segments_of(np.zeros((0, 100, 100), dtype=bool))
    assert draw_crop((100, 100), nothing, np.random.default_rng(0), options) is not None


def test_colours_change_and_nothing_else():
    image = noise((40, 30))
    objects = some([(3, 4, 20, 21)])
    after, same = augment(image, objects, np.random.default_rng(5), only("colour"))
    assert same.boxes.tolist() == objects.boxes.tolist()
    assert after.tobytes() != image.tobytes()
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    for seed in range(30):  # saturation and hue leave gray gray; brightness moves it by an eighth at most
        low, high = recoloured(gray, np.random.default_rng(seed), only("colour")).convert("L").getextrema()
        assert 111 <= low <= high <= 145


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"flip": 1.5}, "flip"),
        ({"crop": -0.1}, "crop"),
        ({"scale": (1.5, 0.5)}, "least factor first"),
        ({"scale": (0, 1)}, "scale"),
        ({"crop_side": 0}, "crop_side"),
        ({"color": 0.5}, "color"),
    ],
)
def test_options_are_checked(given, said):
    with pytest.raises(ValidationError, match=said):
        AugmentOptions(**given)


def test_options_do_not_change():
    with pytest.raises(ValidationError):
        AugmentOptions().flip = 1
    assert AugmentOptions.model_validate({"scale": [0.5, 2]}).scale == (0.5, 2)


def test_options_are_documented_with_their_defaults():
    texts = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for name, field in AugmentOptions.model_fields.items():
        assert field.description
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert f"| `{name}` | {default} |" in texts, name
