"""Pictures side by side with captions under them; clips as rows of frames."""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metacanvas_jax.data.records import Record

_LINE, _PAD = 13, 8


def sheet(records: Sequence[Record], drawn: np.ndarray) -> Image.Image:
    """What each record shows, what was drawn, (B, F, H, W, 3) uint8, and what was wanted."""
    if drawn.shape[1] == 1:
        return _pictures(records, drawn[:, 0])
    rows, texts, beside = [], [], []
    for record, clip in zip(records, drawn, strict=True):
        found = [(record.text, clip), ('source', record.source), ('wanted', record.pixels)]
        for name, frames in found:
            if frames is not None:
                rows.append(frames)
                texts.append(name)
                beside.append([shown for _, shown in _shown(record)] if frames is clip else [])
    return clips_sheet(rows, texts, beside)


def moving_sheet(records: Sequence[Record], drawn: np.ndarray) -> np.ndarray:
    """(F, rows, columns, 3): in each frame all that `sheet` has of clips."""

    def at(frame: int, record: Record) -> Record:
        clips = {'source': record.source, 'pixels': record.pixels}
        found = {name: clip[frame : frame + 1] for name, clip in clips.items() if clip is not None}
        return dataclasses.replace(record, **found)

    sheets = (
        _pictures([at(frame, record) for record in records], drawn[:, frame])
        for frame in range(drawn.shape[1])
    )
    return np.stack([np.asarray(sheet) for sheet in sheets])


def _shown(record: Record) -> list[tuple[str, np.ndarray]]:
    """Pictures (H, W, 3) by name, besides a source."""
    first = [] if record.first is None else [('first frame', record.first)]
    return [*first, *(('reference', picture) for picture in record.references)]


def _pictures(records: Sequence[Record], drawn: np.ndarray) -> Image.Image:
    """As many cells for each record, so that what was drawn stands in columns."""
    groups = []
    for record, picture in zip(records, drawn, strict=True):
        source = [] if record.source is None else [('source', record.source[0])]
        wanted = [] if record.pixels is None else [('wanted', record.pixels[0])]
        groups.append(([*source, *_shown(record)], [(record.text, picture), *wanted]))
    left, right = (max(map(len, side)) for side in zip(*groups, strict=True))
    nothing = [('', np.full_like(drawn[0], 255))]
    cells = []
    for shown, made in groups:
        cells += [*shown, *nothing * (left - len(shown)), *made, *nothing * (right - len(made))]
    texts, pictures = zip(*cells, strict=True)
    each = left + right
    return contact_sheet(pictures, texts, columns=max(1, 6 // each) * each)


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 6, side: int = 128
) -> Image.Image:
    """uint8 (H, W, 3) each, enlarged without smoothing."""
    font = ImageFont.load_default(size=11)
    texts = [textwrap.wrap(caption, side // 6)[:3] for caption in captions]
    cell_w, cell_h = side + _PAD, side + 3 * _LINE + 2 * _PAD
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new('RGB', (columns * cell_w + _PAD, rows * cell_h + _PAD), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = _PAD + i % columns * cell_w, _PAD + i // columns * cell_h
        _paste(sheet, picture, x, y, (side, side))
        draw.multiline_text((x, y + side + 2), '\n'.join(text), fill='black', font=font, spacing=1)
    return sheet


def clips_sheet(
    clips: Sequence[np.ndarray],
    captions: Sequence[str],
    beside: Sequence[Sequence[np.ndarray]] = (),
    *,
    columns: int = 6,
    height: int = 96,
) -> Image.Image:
    """Clips (F, H, W, 3) uint8, a row each: the caption, and frames evenly from first to last.

    Frames keep their shape, and a clip of fewer frames than columns shows each of them once. Left
    of the first ones stand pictures (H, W, 3) that go with a clip.
    """
    font = ImageFont.load_default(size=11)
    beside = beside or [()] * len(clips)
    most = max(map(len, beside))
    left = most * (height + _PAD) + (_PAD if most else 0)
    widths = [round(height * clip.shape[2] / clip.shape[1]) for clip in clips]
    cell_h = height + _LINE + 2 * _PAD
    size = (left + columns * (max(widths) + _PAD) + _PAD, len(clips) * cell_h + _PAD)
    sheet = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(sheet)
    rows = zip(clips, captions, beside, widths, strict=True)
    for row, (clip, caption, shown, width) in enumerate(rows):
        y = _PAD + row * cell_h
        line = textwrap.shorten(caption, size[0] // 6, placeholder=' ...')
        draw.text((_PAD, y), line, fill='black', font=font)
        for column, picture in enumerate(shown):
            side = min(height, round(height * picture.shape[1] / picture.shape[0]))
            _paste(sheet, picture, _PAD + column * (height + _PAD), y + _LINE + 4, (side, height))
        chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        for column, frame in enumerate(chosen):
            x = left + _PAD + column * (width + _PAD)
            _paste(sheet, clip[frame], x, y + _LINE + 4, (width, height))
    return sheet


def _paste(sheet: Image.Image, picture: np.ndarray, x: int, y: int, size: tuple[int, int]) -> None:
    sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y))
    box = (x - 1, y - 1, x + size[0], y + size[1])
    ImageDraw.Draw(sheet).rectangle(box, outline='#bbbbbb')
