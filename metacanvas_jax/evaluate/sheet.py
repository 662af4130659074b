"""Pictures side by side with captions under them; clips as rows of frames."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metacanvas_jax.data.records import Record

_LINE, _PAD = 13, 8


def sheet(records: Sequence[Record], drawn: np.ndarray) -> Image.Image:
    """What each record shows, what was drawn, (B, F, H, W, 3) uint8, and what was wanted."""
    if drawn.shape[1] > 1:
        rows, texts = [], []
        for record, clip in zip(records, drawn, strict=True):
            shown = [('source', record.source), ('wanted', record.pixels)]
            found = [(record.text, clip), *((n, c) for n, c in shown if c is not None)]
            texts += [name for name, _ in found]
            rows += [frames for _, frames in found]
        return clips_sheet(rows, texts)
    pictures, texts = [], []
    for record, (picture, *_) in zip(records, drawn, strict=True):
        source = [] if record.source is None else [('source', record.source[0])]
        wanted = [] if not source or record.pixels is None else [('wanted', record.pixels[0])]
        for name, shown in (*source, (record.text, picture), *wanted):
            pictures.append(shown)
            texts.append(name)
    return contact_sheet(np.stack(pictures), texts)


def contact_sheet(
    pictures: np.ndarray, captions: Sequence[str], *, columns: int = 6, side: int = 128
) -> Image.Image:
    """(N, H, W, 3) uint8, enlarged without smoothing."""
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
    clips: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 6, height: int = 96
) -> Image.Image:
    """Clips (F, H, W, 3) uint8, a row each: the caption, and frames evenly from first to last.

    Frames keep their shape, and a clip of fewer frames than columns shows each of them once.
    """
    font = ImageFont.load_default(size=11)
    widths = [round(height * clip.shape[2] / clip.shape[1]) for clip in clips]
    cell_h = height + _LINE + 2 * _PAD
    size = (columns * (max(widths) + _PAD) + _PAD, len(clips) * cell_h + _PAD)
    sheet = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(sheet)
    for row, (clip, caption, width) in enumerate(zip(clips, captions, widths, strict=True)):
        y = _PAD + row * cell_h
        line = textwrap.shorten(caption, size[0] // 6, placeholder=' ...')
        draw.text((_PAD, y), line, fill='black', font=font)
        chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        for column, frame in enumerate(chosen):
            x = _PAD + column * (width + _PAD)
            _paste(sheet, clip[frame], x, y + _LINE + 4, (width, height))
    return sheet


def _paste(sheet: Image.Image, picture: np.ndarray, x: int, y: int, size: tuple[int, int]) -> None:
    sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y))
    box = (x - 1, y - 1, x + size[0], y + size[1])
    ImageDraw.Draw(sheet).rectangle(box, outline='#bbbbbb')
