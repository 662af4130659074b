"""Sheets: every picture and frame is where a reader looks for it."""

import numpy as np

from metacanvas_jax.data.records import Record
from metacanvas_jax.evaluate.sheet import clips_sheet, contact_sheet, moving_sheet, sheet


def plain(frames, height, width):
    """Frame i is of colour (i, 100, 200)."""
    clip = np.full((frames, height, width, 3), (0, 100, 200), np.uint8)
    clip[..., 0] += np.arange(frames, dtype=np.uint8)[:, None, None]
    return clip


def found(sheet):
    """[[i of each frame that is drawn] of each row], and the sizes of the frames."""
    pixels = np.asarray(sheet)
    inside = (pixels[..., 1] == 100) & (pixels[..., 2] == 200)
    rows = np.flatnonzero(np.diff(inside.any(1).astype(int), prepend=0) == 1)
    told = []
    for y in rows:
        columns = np.flatnonzero(np.diff(inside[y].astype(int), prepend=0) == 1)
        told.append([int(pixels[y, x, 0]) for x in columns])
    return told


def test_clips_are_rows_of_frames_from_first_to_last():
    sheet = clips_sheet(
        [plain(17, 8, 8), plain(2, 8, 8), plain(121, 6, 12)],
        ['a red circle moves right', 'references', 'word ' * 100],
        columns=5,
        height=24,
    )
    assert found(sheet) == [[0, 4, 8, 12, 16], [0, 1], [0, 30, 60, 90, 120]]
    last = np.asarray(sheet)[-46:]  # of 12 x 6 pixels, drawn 48 x 24
    assert ((last[..., 1] == 100) & (last[..., 2] == 200)).sum() == 5 * 48 * 24


def test_clips_stand_beside_what_they_were_made_from():
    """References left of the frames that were drawn; a source and what was wanted in rows below."""
    one, two = plain(2, 8, 8) + np.uint8([50, 0, 0])
    records = [
        Record('a', plain(5, 8, 8) + np.uint8([20, 0, 0]), references=(one, two)),
        Record('b', source=plain(5, 8, 8) + np.uint8([10, 0, 0]), first=one),
        Record('c'),
    ]
    drawn = np.stack([plain(5, 8, 8)] * 3)
    five = np.arange(5)
    assert found(sheet(records, drawn)) == [
        [50, 51, *five],
        [*five + 20],
        [50, *five],
        [*five + 10],
        [*five],
    ]
    moving = moving_sheet(records, drawn)
    assert len(moving) == 5
    assert found(moving[3]) == [[50, 51, 3, 23], [13, 50, 3], [3]]


def test_captions_stand_over_clips_and_under_pictures():
    sheet = clips_sheet([plain(5, 8, 8)] * 2, ['', 'a red circle'], columns=3, height=32)
    dark = (np.asarray(sheet).max(-1) < 100).any(1)
    rows = np.flatnonzero(dark)
    assert 61 + 8 < rows.min() <= rows.max() < 61 + 8 + 13 + 4
    pictures = np.concatenate([plain(3, 8, 8)])
    sheet = contact_sheet(pictures, ['', '', 'a red circle'], columns=2, side=32)
    assert found(sheet) == [[0, 1], [2]]
    rows = np.flatnonzero((np.asarray(sheet).max(-1) < 100).any(1))
    assert rows.min() > 8 + (32 + 39 + 16) + 32
