"""The one place where meshes are named: logical axes of parameters, mesh axes of machines.

Layers write the logical axes of a parameter beside its shape; RULES says on which mesh axis each
one lies. Specs are right-aligned, so the axis that `stack` adds in front of layers stays whole.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metacanvas_jax.types import InputError

MESH_AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

RULES = {
    'embed': 'fsdp',  # the residual width
    'mlp': 'tensor',  # hidden width of a feed-forward
    'heads': 'tensor',  # query heads x head width
    'kv': 'tensor',  # key/value heads x head width
    'vocab': 'tensor',
    'rank': None,  # LoRA
    'canvas': None,  # canvas rows and columns
    'channels': None,  # latent channels, sinusoids, tables
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes; one -1 takes what is left."""
    sizes = np.array([data, fsdp, tensor])
    devices = jax.device_count()
    known = int(np.prod(sizes[sizes > 0]))
    if (sizes < 0).sum() > 1 or (sizes == 0).any() or devices % known:
        raise InputError(
            f'mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {devices} devices; '
            'their product must equal the number of devices (one may be -1)'
        )
    sizes[sizes < 0] = devices // known
    if np.prod(sizes) != devices:
        raise InputError(
            f'mesh data={data} fsdp={fsdp} tensor={tensor} asks for {np.prod(sizes)} devices, '
            f'{devices} are here; set one of them to -1'
        )
    # 0.10 makes explicit axes by default, which want an out_sharding at every ambiguous operation.
    return jax.make_mesh(tuple(sizes.tolist()), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(variable, rules: Mapping[str, str | None] = RULES) -> P:
    axes = variable.get_metadata('axes', ()) if isinstance(variable, nnx.Variable) else ()
    if unknown := set(axes) - set(rules) - {None}:
        raise ValueError(f'no rule for logical axes {sorted(unknown)}; RULES has {sorted(rules)}')
    front = (None,) * (len(variable.shape) - len(axes))
    return P(*front, *(rules.get(axis) for axis in axes))


def shardings(tree, mesh: Mesh):
    """NamedSharding for every leaf of a module, a state or an optimizer state.

    A dimension that its mesh axis does not divide stays whole: right on any machine, merely larger.
    """

    def place(leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        axes = partition_spec(leaf)
        fits = (
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, axes, strict=True)
        )
        return leaf.replace(NamedSharding(mesh, P(*fits)))

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Pins an activation; does nothing without a mesh, so tests on one device need none."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_heads(*arrays_BSNE: jax.Array) -> tuple[jax.Array, ...]:
    """Pins queries, keys and values alike, which cuDNN's attention wants; tokens stay whole.

    Where an axis of the mesh does not divide all of them, that dimension stays whole in all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return arrays_BSNE

    def split(dimension: int, *axes: str) -> tuple[str, ...] | None:
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        return None if any(a.shape[dimension] % parts for a in arrays_BSNE) else axes

    spec = P(split(0, *BATCH_AXES), None, split(2, 'tensor'), None)
    return tuple(jax.lax.with_sharding_constraint(a, spec) for a in arrays_BSNE)


def put_batch(batch, mesh: Mesh):
    """This process' rows of a host batch, as global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
