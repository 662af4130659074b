"""A measurement as a JSON file, with the machine and the versions beside it."""

import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any


def record(output: str, result: Mapping[str, Any], *, load: float, packages: Sequence[str]) -> None:
    """`load` is the machine's load average from before the run."""
    machine = {
        'cores': os.cpu_count(),
        'load_before': round(load, 2),
        'python': platform.python_version(),
        **{name: version(name) for name in packages},
    }
    text = json.dumps({**result, 'machine': machine, 'date': time.strftime('%Y-%m-%d')}, indent=2)
    path = pathlib.Path(output)
    (part := path.with_suffix('.part')).write_text(text + '\n')
    part.replace(path)
    print(text)


def version(name: str) -> str | None:
    """None: not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
