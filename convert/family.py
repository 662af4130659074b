"""What one family of checkpoints is: its layouts on disk, its sizes, its model."""

import dataclasses
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
    # Comes without a config.json: one beside it is another model's, and an import writes it.
    bare: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A file of this package holds one, and `registry.FAMILIES` lists them."""

    # From the folder's config.json; from the shapes where a layout comes without one.
    sizes: Callable[[pathlib.Path, Shapes], Any]
    sizes_of: Callable[[nnx.Module], Any]  # with a method to_json, the published config.json
    model: Callable[[Any, Any, nnx.Rngs], nnx.Module]  # of the sizes and the dtype to compute in
    layouts: Mapping[str, Layout]  # the first one is exported unless another is asked for

    def parameters(self, sizes: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: shape} of the model's parameters; nothing is allocated."""
        return parameters(self.abstract(sizes))

    def abstract(self, sizes: Any, dtype: Any = jnp.float32) -> nnx.Module:
        return jax.eval_shape(lambda: self.model(sizes, dtype, nnx.Rngs(0)))


def parameters(module: nnx.Module) -> dict[str, Any]:
    """{slash-joined path: array} of a module, abstract or not."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {'/'.join(map(str, path)): variable.get_value() for path, variable in flat}
