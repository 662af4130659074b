"""Which parameters learn: full-path patterns, each of which must match something."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from flax import nnx

from metacanvas_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Path:
    """nnx filter: the whole slash-joined path matches `pattern`."""

    pattern: str

    def __call__(self, path, _) -> bool:
        return re.fullmatch(self.pattern, '/'.join(map(str, path))) is not None


def parameter_sizes(model: nnx.Module) -> dict[str, int]:
    """{path: number of values} of a module, abstract or not."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {'/'.join(map(str, path)): int(np.prod(value.shape)) for path, value in flat}


def trainable_filter(patterns: Sequence[str], model: nnx.Module) -> nnx.filterlib.Filter:
    sizes = parameter_sizes(model)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in sizes):
            raise InputError(
                f'config.trainable: pattern {pattern!r} matches none of {len(sizes)} parameters, '
                f'such as {", ".join(list(sizes)[:3])}'
            )
    return nnx.Any(*map(Path, patterns))


def trainable_table(patterns: Sequence[str], model: nnx.Module) -> str:
    """(pattern, tensors, parameters), the first matching pattern counting, and the frozen rest."""
    rows = {pattern: [0, 0] for pattern in (*patterns, '(frozen)')}
    for path, size in parameter_sizes(model).items():
        matching = (pattern for pattern in patterns if re.fullmatch(pattern, path))
        row = rows[next(matching, '(frozen)')]
        row[0], row[1] = row[0] + 1, row[1] + size
    width = max(map(len, rows))
    lines = [f'{"trainable":{width}}  tensors      parameters']
    lines += [f'{name:{width}}  {n:7,}  {size:14,}' for name, (n, size) in rows.items()]
    return '\n'.join(lines)
