"""What one family of checkpoints is: its layouts on disk, its sizes, its model."""

import dataclasses
import operator
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert.rules import Rule, Shapes


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which the family is published. Names alone tell layouts and families apart."""

    signs: tuple[str, ...]  # tensors that this layout has and, all together, no other one
    rules: Callable[[Any], list[Rule]]  # of the sizes
    file: str  # stem of the exported files
    config: Callable[[Any], Mapping[str, Any]] = operator.methodcaller('to_json')  # of the sizes
    # Of a layout that comes as one file without config.json; one beside it may be another model's.
    sizes: Callable[[pathlib.Path, Shapes], Any] | None = None
    # {start of names: why these tensors of a larger model are not converted}
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def taken(self, tensors: Shapes) -> Shapes:
        """Without those that are left."""
        return {n: a for n, a in tensors.items() if not n.startswith(tuple(self.left))}


@dataclasses.dataclass(frozen=True)
class Family:
    """A file of this package holds one, and `registry.FAMILIES` lists them."""

    # From the folder's config.json, or from the shapes of our own parameters.
    sizes: Callable[[pathlib.Path, Shapes], Any]
    model: Callable[..., nnx.Module]  # (sizes, dtype to compute in, rngs)
    layouts: Mapping[str, Layout]  # the first one is exported unless another is asked for
    # With a method to_json, the published config.json.
    sizes_of: Callable[[Any], Any] = operator.attrgetter('config')

    def published_sizes(self, layout: Layout, folder: pathlib.Path, tensors: Shapes) -> Any:
        """Of a checkpoint in this layout."""
        return (layout.sizes or self.sizes)(folder, tensors)

    def parameters(self, sizes: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: shape} of the model's parameters; nothing is allocated."""
        return parameters(self.abstract(sizes))

    def abstract(self, sizes: Any, dtype: Any = jnp.float32) -> nnx.Module:
        return jax.eval_shape(lambda: self.model(sizes, dtype=dtype, rngs=nnx.Rngs(0)))


def from_config(read: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path, Shapes], Any]:
    """Sizes that the folder's config.json says, whatever the shapes."""
    return lambda folder, shapes: read(folder)


def parameters(module: nnx.Module) -> dict[str, Any]:
    """{slash-joined path: array} of a module, abstract or not."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {'/'.join(map(str, path)): variable.get_value() for path, variable in flat}
