"""The sizes, of about a megapixel each, on which FLUX.1-Kontext was trained (arXiv 2506.15742).

The pipeline brings a context image to the one of the nearest aspect ratio.
"""

KONTEXT_SIZES = (  # height, width
    *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880)),
    *((1104, 944), (1024, 1024), (944, 1104)),
    *((880, 1184), (832, 1248), (800, 1328), (752, 1392), (720, 1456), (688, 1504), (672, 1568)),
)


def nearest_kontext_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) whose ratio is the nearest; of two as near, the narrower."""
    ratio = width / height
    return min(KONTEXT_SIZES, key=lambda size: (abs(ratio - size[1] / size[0]), size[1]))
