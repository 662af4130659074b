"""Pictures side by side with captions under them."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    pictures: np.ndarray, captions: Sequence[str], *, columns: int = 6, side: int = 128
) -> Image.Image:
    """(N, H, W, 3) uint8, enlarged without smoothing."""
    font = ImageFont.load_default(size=11)
    line, pad = 13, 8
    texts = [textwrap.wrap(caption, side // 6)[:3] for caption in captions]
    cell_w, cell_h = side + pad, side + 3 * line + 2 * pad
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new('RGB', (columns * cell_w + pad, rows * cell_h + pad), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = pad + i % columns * cell_w, pad + i // columns * cell_h
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline='#bbbbbb')
        draw.multiline_text((x, y + side + 2), '\n'.join(text), fill='black', font=font, spacing=1)
    return sheet
