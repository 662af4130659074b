"""Whether a checkpoint, or a list of its names and shapes, fits our model; reads no weights."""

import json
import pathlib
import tempfile
from typing import Any

import jax

from convert import registry
from convert.family import Layout
from convert.rules import Match, Shapes, match
from convert.source import open_source
from metacanvas_jax.types import InputError


def check_source(component: str, source: str) -> tuple[str, bool]:
    """A report, and whether all fits."""
    opened = open_source(source)
    return _check(component, opened.tensors, opened.folder, source, opened.folder.name)


def check_manifest(component: str, manifest: str) -> tuple[str, bool]:
    """`manifest` is JSON: "config" as in config.json, "tensors" as {name: shape}."""
    path = pathlib.Path(manifest)
    try:
        values = json.loads(path.read_text(encoding='utf-8'))
        config: dict[str, Any] = values['config']
        dtype = values.get('dtype_on_disk', 'float32')
        tensors = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype)
            for name, shape in values['tensors'].items()
        }
    except OSError as error:
        raise InputError(f'cannot read {path}: {error.strerror}') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is no manifest of a checkpoint: {error!r}') from error
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, 'config.json').write_text(json.dumps(config), encoding='utf-8')
        return _check(component, tensors, pathlib.Path(folder), manifest, path.stem)


def _check(
    component: str, tensors: Shapes, folder: pathlib.Path, where: str, name: str
) -> tuple[str, bool]:
    family = registry.find(component)
    layout = registry.find_layout(component, tensors, where)
    sizes = family.published_sizes(layout, folder, tensors)
    found = match(layout.rules(sizes), layout.taken(tensors), family.parameters(sizes))
    return _report(name, tensors, found, layout), found.fits


def _report(name: str, tensors: Shapes, found: Match, layout: Layout) -> str:
    count = sum(tensor.size for tensor in tensors.values())
    lines = [
        f'{name}: {len(tensors)} tensors, {count} parameters, {len(found.unused)} unused, '
        f'{len(found.unfilled)} unfilled, {len(found.misshapen)} misshapen'
    ]
    for title, items in found.problems().items():
        lines += [f'{title}:', *(f'  {item}' for item in items)]
    for start, why in layout.left.items():
        if number := sum(name.startswith(start) for name in tensors):
            lines.append(f'{number} tensors {start}* are left: {why}')
    return '\n'.join(lines)
