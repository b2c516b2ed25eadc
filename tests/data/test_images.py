"""Images of every mode and state: the right conversion, or one message with the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from peftlab.data import Augmentation, Change, Rows, read_images
from peftlab.errors import DataError


def stored(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(value: Any, mode: str = "RGB") -> np.ndarray:
    rows = Rows.from_dicts([{"image": value}], name="rows.csv")
    ((image, _),) = read_images(rows, "image", length=1)
    return np.asarray(image.pixels(mode))


GREY = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)


def test_pixels_of_16_bits_keep_their_upper_8() -> None:
    deep = PIL.Image.fromarray((np.asarray(GREY).astype(np.uint16) << 8) + 7)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(read(stored(deep, kind), "L"), np.asarray(GREY))


def test_grey_palette_and_cmyk_become_rgb() -> None:
    assert np.array_equal(read(stored(GREY))[..., 2], np.asarray(GREY))
    assert np.array_equal(read(stored(GREY.convert("P")))[..., 0], np.asarray(GREY))
    assert read(stored(GREY.convert("CMYK"), "TIFF")).shape == (8, 8, 3)


def test_transparent_pixels_show_white() -> None:
    clear = GREY.convert("RGBA")
    clear.putalpha(PIL.Image.fromarray(np.where(np.arange(64).reshape(8, 8) < 32, 0, 255).astype(np.uint8)))
    pixels = read(stored(clear))
    assert (pixels[:4] == 255).all() and np.array_equal(pixels[4:, :, 0], np.asarray(GREY)[4:])


def test_photographs_stand_upright_as_their_camera_says() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert np.array_equal(read(stored(GREY, exif=exif), "L"), np.rot90(np.asarray(GREY), -1))


def test_first_frame_of_an_animation_is_read() -> None:
    frames = [GREY.point(lambda value, i=i: value // (i + 1)) for i in range(3)]
    raw = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(raw, "L"), np.asarray(GREY))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_file_that_is_cut_off_is_found_before_training(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    raw = stored(PIL.Image.fromarray(noise), kind)
    read(raw)
    file = tmp_path / "cut"
    file.write_bytes(raw[: int(share * len(raw))])
    rows = Rows.from_dicts([{"image": str(file)}], name="rows.csv")
    with pytest.raises(DataError, match=r"rows.csv, record 1: expected an image, found a damaged file .*cut"):
        list(read_images(rows, "image", length=1))


@pytest.mark.parametrize(
    ("value", "message"),
    [(b"", "found an empty file"), (stored(PIL.Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "fractions")],
)
def test_other_files_are_named(value: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"rows.csv, record 1: .*{message}"):
        read(value)


def test_image_that_is_too_large_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"rows.csv, record 1: the image has 64 pixels, more than Pillow opens"):
        read(stored(GREY))


# Random changes


def test_changes_depend_on_the_generator_and_stay_in_their_bounds() -> None:
    augment = Augmentation(flip=0.5, crop=(0.5, 0.9), rotate=10, color=0.2)
    drawn = [augment.draw(np.random.default_rng([0, step, 3])) for step in range(400)]
    assert drawn == [augment.draw(np.random.default_rng([0, step, 3])) for step in range(400)]
    areas = [(c.crop[2] - c.crop[0]) * (c.crop[3] - c.crop[1]) for c in drawn]
    assert 0.5 <= min(areas) < 0.52 and 0.88 < max(areas) <= 0.9
    assert all(c.crop[0] >= 0 and c.crop[2] <= 1 + 1e-12 and abs(c.angle) <= 10 for c in drawn)
    assert 0.4 < np.mean([c.flip for c in drawn]) < 0.6
    assert all(0.8 <= factor <= 1.2 for c in drawn for factor in c.colours)
    assert len(set(drawn)) == 400


def test_change_by_hand() -> None:
    image = PIL.Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10))
    changed = Change(crop=(0.2, 0.0, 0.8, 0.5), flip=True).apply(image)
    assert np.array_equal(np.asarray(changed), np.asarray(image)[:5, 2:8][:, ::-1])
    turned = np.asarray(Change(angle=180).apply(image))
    assert np.array_equal(turned, np.asarray(image)[::-1, ::-1])
    bright = np.asarray(Change(colours=(1.5, 1.0, 1.0)).apply(image))
    assert np.array_equal(bright, (np.asarray(image) * 1.5).astype(np.uint8))
    assert np.array_equal(np.asarray(Change().apply(image)), np.asarray(image))


def test_boxes_follow_crop_and_mirror() -> None:
    change = Change(crop=(0.2, 0.0, 0.8, 0.5), flip=True)
    boxes = np.array([[3.0, 1.0, 5.0, 4.0], [0.0, 2.0, 4.0, 9.0], [0.0, 0.0, 2.0, 2.0], [4.0, 6.0, 6.0, 8.0]])
    moved, kept = change.boxes(boxes, 10, 10)
    assert kept.tolist() == [0, 1]
    assert moved.tolist() == [[3.0, 1.0, 5.0, 4.0], [4.0, 2.0, 6.0, 5.0]]
    # The pixels of the first box are where the moved box is.
    pixels = np.zeros((10, 10), dtype=np.uint8)
    pixels[1:4, 3:5] = 255
    seen = np.argwhere(np.asarray(change.apply(PIL.Image.fromarray(pixels))))
    assert seen.min(0).tolist() == [1, 3] and (seen.max(0) + 1).tolist() == [4, 5]
