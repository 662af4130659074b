"""The Python API: pipe = load(workdir); pipe('a red circle').images[0].save('out.png').

A system of an MLLM alone loads as a `Describer`; a `Pipeline` has one of its own.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from PIL import Image

from metacanvas_jax.build import (
    COMPONENTS,
    DTYPES,
    build_encoder,
    build_model,
    build_readers,
    check_size,
    choose,
    weights_folder,
)
from metacanvas_jax.checkpoint import RunCheckpoints
from metacanvas_jax.data.tasks import TASKS, Asked
from metacanvas_jax.describe import Describer
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.path import frame_times
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.flow.times import schedule
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.sharding import BATCH_AXES, make_mesh
from metacanvas_jax.train.state import abstract, split_model
from metacanvas_jax.train.trainable import trainable_filter
from metacanvas_jax.train.workdir import read_config
from metacanvas_jax.types import InputError, Texts, Visual
from metacanvas_jax.weights import comes_from_weights, match_weights, place_weights


@dataclasses.dataclass(frozen=True)
class Output:
    """`images` are PIL images, or one array: uint8 pixels for 'np', fp32 latents for 'latent'."""

    images: list[Image.Image] | np.ndarray


def check_model(config: ConfigDict) -> nnx.filterlib.Filter:
    """Which parameters learn; refuses patterns and weights that do not fit, in no time."""
    model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    for prefix, folder in _weights(config):
        match_weights(nnx.state(model), folder, prefix)
    wanted = trainable_filter(config.trainable, model)
    _refuse_frozen_noise(config, nnx.state(model), wanted)
    return wanted


def _weights(config: ConfigDict) -> list[tuple[str, pathlib.Path]]:
    """(where in the model, the folder) of the weights that a run starts from."""
    places = COMPONENTS[config.objective]
    given = [(name, weights_folder(config, name)) for name in config.weights]
    return [(choose(places, name, 'config.weights'), folder) for name, folder in given if folder]


def _refuse_frozen_noise(config: ConfigDict, state: nnx.State, wanted) -> None:
    """A part without weights must learn; for tests there is `random`."""
    trainable, frozen = (
        [path for path, _ in nnx.to_flat_state(part)]
        for part in nnx.split_state(state, wanted, ...)
    )
    for name, prefix in COMPONENTS[config.objective].items():
        learning, still = (
            any(comes_from_weights(path, prefix) for path in paths) for paths in (trainable, frozen)
        )
        if still and not learning and config.weights.get(name) is None:
            raise InputError(
                f'config.weights.{name} is missing, and nothing of it learns; give the folder of '
                'converted weights'
            )


def starting_model(config: ConfigDict, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model that a run starts from: initial values, with published weights over them."""
    make = functools.partial(build_model, config)
    wanted = check_model(config)
    weights = _weights(config)
    graphdef, *parts = split_model(
        make,
        wanted,
        seed=config.seed,
        frozen_dtype=DTYPES[config.dtype],
        mesh=mesh,
        given=lambda path, _: any(comes_from_weights(path, prefix) for prefix, _ in weights),
    )
    whole = nnx.merge_state(*parts)
    for prefix, folder in weights:
        whole = place_weights(whole, folder, prefix)
    trainable, frozen = nnx.split_state(whole, wanted, ...)
    return graphdef, trainable, frozen


def load(
    source: str | pathlib.Path | ConfigDict, weights: Mapping[str, str] | None = None
) -> 'Pipeline | Describer':
    """A train workdir or one of its steps; or a config, and the folders of its weights by name."""
    mesh, path = make_mesh(), None
    if isinstance(source, ConfigDict):
        config = ConfigDict(source).copy_and_resolve_references()  # the caller's stays as it is
        with config.unlocked():
            config.weights.update(weights or {})
    else:
        config = read_config(path := pathlib.Path(source).absolute())
    graphdef, trainable, frozen = starting_model(config, mesh)
    if path is not None:
        trainable = _trained(path, trainable, average=config.optimizer.ema > 0)
    make = choose(PIPELINES, config.objective, 'config.objective')
    return make(config, graphdef, nnx.merge_state(trainable, frozen), mesh)


def _trained(path: pathlib.Path, trainable: nnx.State, *, average: bool) -> nnx.State:
    """What a run learned; the averaged weights, where it kept them."""
    is_step = path.parent.name == 'checkpoints'
    shapes = abstract(trainable)
    wanted = {'ema': shapes} if average else {'trainable': shapes}
    folder = path.parent if is_step else path / 'checkpoints'
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(wanted, step=int(path.name) if is_step else None, partial=True)
    if found is None:
        raise InputError(f'no usable checkpoint in {folder}')
    (trained,) = found[1].values()
    return trained


class Pipeline:
    """Text to pictures. Image i of a call has the noise of fold_in(key(seed), i)."""

    def __init__(self, config: ConfigDict, graphdef, state: nnx.State, mesh: Mesh):
        self.config, self._graphdef, self._state, self._mesh = config, graphdef, state, mesh
        self._readers = build_readers(config)
        self._vae = nnx.merge(graphdef, state).vae
        whole = NamedSharding(mesh, P())
        static = ('latents', 'solver', 'guidance', 'callback')
        self._solve = jax.jit(self._solve, static_argnames=static, out_shardings=whole)
        self._features = jax.jit(self._features, static_argnames='latents', out_shardings=whole)
        self._decode = jax.jit(self._decode, out_shardings=whole)

    def with_state(self, state: nnx.State) -> 'Pipeline':
        """The same programs with other parameters of the same shapes."""
        other = object.__new__(Pipeline)
        other.__dict__ = {**self.__dict__, '_state': state}
        return other

    @property
    def has_canvas(self) -> bool:
        return 'canvas' in self.config and self.config.canvas.fuse != 'none'

    @property
    def describer(self) -> Describer:
        """The MLLM of this pipeline, to be asked about pictures."""
        mllm = self._model(self._state).mllm
        if mllm is None or self._readers.mllm is None:
            raise InputError('this system has no MLLM to ask')
        return Describer(self._readers.mllm, mllm, self._mesh)

    # ------------------------------------------------------------ for users

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = '',
        seed: int = 0,
        num_images: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        noise: np.ndarray | None = None,
        callback: Callable | None = None,
        output: str = 'pil',
    ) -> Output:
        """`noise`: initial latents (B, H, W, C); `callback(t, latents)` is called at each step."""
        prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
        latents = self.sample(
            prompts,
            indices=range(len(prompts)),
            seed=seed,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            size=(height, width),
            noise=noise,
            callback=callback,
        )
        if output == 'latent':
            return Output(latents[:, 0])
        pixels = self.decode(latents)
        return Output(pixels if output == 'np' else [Image.fromarray(image) for image in pixels])

    # ------------------------------------------------------------ in batches

    def sample(
        self,
        prompts: Sequence[str],
        *,
        indices: Sequence[int],
        seed: int,
        negative_prompt: str = '',
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int | None, int | None] = (None, None),
        noise: np.ndarray | None = None,
        callback: Callable | None = None,
    ) -> np.ndarray:
        """Latents (B, T, H, W, C); the picture of prompt j has the noise of index `indices[j]`."""
        latents = self._latents(size)
        z_1 = self._noise(indices, seed, latents) if noise is None else self._given(noise, latents)
        default = self.config.sample
        guidance = default.guidance if guidance is None else guidance
        prompt, negative = self._pair(prompts, negative_prompt, indices, seed)
        solver = choose(SOLVERS, default.solver, 'config.sample.solver')
        z = self._solve(
            self._state,
            prompt,
            negative,
            self._put(z_1),
            solver.times(steps or default.steps, default.shift),
            latents=latents,
            solver=solver.solve,
            guidance=float(guidance),
            callback=callback,
        )
        return np.asarray(z)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8."""
        with jax.set_mesh(self._mesh):
            pixels = self._decode(self._state, jnp.asarray(latents))
        return np.asarray(jnp.clip(jnp.round(pixels * 127.5 + 127.5), 0, 255), np.uint8)[:, 0]

    def canvas_features(
        self, prompts: Sequence[str], *, indices: Sequence[int], seed: int
    ) -> np.ndarray:
        """What the canvas adds to the latents half-way to the picture: (B, T, h, w, D) (App. I).

        Half-way along Euler's steps, whatever the solver.
        """
        if not self.has_canvas:
            raise InputError(
                'this model has no canvas (config.canvas.fuse is none): nothing to map'
            )
        latents, default = self._latents((None, None)), self.config.sample
        times = schedule(default.steps, default.shift)
        middle = int(jnp.argmin(jnp.abs(times - 0.5)))
        prompt, negative = self._pair(prompts, '', indices, seed)
        z_1 = self._put(self._noise(indices, seed, latents))
        z = self._solve(
            self._state,
            prompt,
            negative,
            z_1,
            times[: middle + 1],
            latents=latents,
            solver=SOLVERS['euler'].solve,
            guidance=float(default.guidance),
            callback=None,
        )
        return np.asarray(self._features(self._state, prompt, z, times[middle], latents=latents))

    # ------------------------------------------------------------ programs

    def _model(self, state) -> MetaCanvas:
        return nnx.merge(self._graphdef, state)

    def _solve(self, state, prompt, negative, z_1, times, *, latents, solver, guidance, callback):
        """The whole sampler is one program."""
        model = self._model(state)

        def velocity(z, t, plan):
            clean_BT = jnp.zeros(z.shape[:2])
            if callback is not None:
                io_callback(callback, None, t, z[: len(z_1)], ordered=True)
            t_BT = frame_times(jnp.full(len(z), t), clean_BT)
            return model.velocity(z, t_BT, plan, Visual(clean_BT=clean_BT))

        plan = model.plan(prompt, latents)
        if guidance == 1:
            return solver(lambda z, t: velocity(z, t, plan), z_1, times)
        return solver(guided(velocity, plan, model.plan(negative, latents), guidance), z_1, times)

    def _decode(self, state, z):
        return self._model(state).vae.decode(z)

    def _features(self, state, prompt, z, t, *, latents):
        model = self._model(state)
        clean_BT = jnp.zeros(z.shape[:2])
        patches = model.backbone.patchify(z, Visual(clean_BT=clean_BT))
        canvas = model.plan(prompt, latents).canvas
        return model.canvas.fusion.features(patches, canvas, jnp.full(clean_BT.shape, t))

    # ------------------------------------------------------------ inputs

    def _latents(self, size: tuple[int | None, int | None]) -> tuple[int, int, int]:
        height, width = (self.config.data.size if side is None else side for side in size)
        check_size(self.config, height, width)
        return 1, height // self._vae.stride, width // self._vae.stride

    def _noise(self, indices, seed: int, latents) -> np.ndarray:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))
        draw = jax.vmap(lambda key: jax.random.normal(key, (*latents, self._vae.channels)))
        return np.asarray(draw(keys(jnp.asarray(indices, jnp.uint32))))

    def _given(self, noise: np.ndarray, latents) -> np.ndarray:
        want = (latents[1], latents[2], self._vae.channels)
        noise = np.asarray(noise, np.float32)
        noise = noise[None] if noise.ndim == 3 else noise
        if noise.shape[1:] != want:
            raise InputError(f'the noise has shape {noise.shape[1:]}, this size wants {want}')
        return noise[:, None]

    def _pair(self, prompts, negative_prompt: str, indices: Sequence[int], seed: int):
        """Both branches of guidance in one bucket: they run as one batch."""
        asked = [Asked(text) for text in prompts]
        against = [Asked(negative_prompt, negative=True)] * len(prompts)
        both = self._texts([*asked, *against], [*indices, *indices], seed)
        halves = slice(len(prompts)), slice(len(prompts), None)
        return [self._put(jax.tree.map(lambda x: x[half], both)) for half in halves]  # noqa: B023

    def _texts(self, asked: list[Asked], indices: Sequence[int], seed: int) -> Texts:
        """Where the run was trained with plans, the MLLM writes one first, but not about nothing.

        Image i has the plan that the MLLM draws with fold_in(key(seed), i).
        """
        encoder = self._readers.mllm
        rows = [row for row, one in enumerate(asked) if one.text]
        if encoder is not None and encoder.plan_tokens and rows:
            answers = self.describer(
                [TASKS['t2i'].prompt(asked[row].text) for row in rows],
                max_new_tokens=encoder.plan_tokens,
                temperature=self.config.sample.temperature,
                seed=seed,
                indices=[indices[row] for row in rows],
            )
            for row, answer in zip(rows, answers, strict=True):
                asked[row] = dataclasses.replace(asked[row], plan=answer.text)
        return self._readers.texts('t2i', asked)

    def _put(self, tree):
        """Host arrays, whole on every process, split over the mesh where the batch allows."""
        parts = int(np.prod([self._mesh.shape[axis] for axis in BATCH_AXES]))

        def put(x):
            x = np.asarray(x)
            spec = P(BATCH_AXES) if len(x) % parts == 0 else P()
            sharding = NamedSharding(self._mesh, spec)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, tree)


def _describer(config: ConfigDict, graphdef, state: nnx.State, mesh: Mesh) -> Describer:
    return Describer(build_encoder(config), nnx.merge(graphdef, state), mesh)


# config.objective -> what its model is used through
PIPELINES = {'flow': Pipeline, 'next_token': _describer}
