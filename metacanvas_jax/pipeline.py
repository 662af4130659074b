"""The Python API: pipe = load(workdir); pipe('a red circle').images[0].save('out.png').

A system of an MLLM alone loads as a `Describer`; a `Pipeline` has one of its own.
"""

import dataclasses
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

from metacanvas_jax.build import choose
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.tasks import TASKS, Asked
from metacanvas_jax.data.visuals import to_float
from metacanvas_jax.describe import Describer
from metacanvas_jax.flow.given import holding, impose
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.flow.times import schedule
from metacanvas_jax.geometry import Geometry, Job, Size
from metacanvas_jax.loading import starting_model, trained
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.readers import build_encoder, build_readers
from metacanvas_jax.sharding import BATCH_AXES, make_mesh
from metacanvas_jax.train.workdir import read_config
from metacanvas_jax.types import InputError, Plan, Texts, Visual


@dataclasses.dataclass(frozen=True)
class Output:
    """`images` are PIL images, or one array: uint8 pixels for 'np', fp32 latents for 'latent'.

    Videos are `frames`, uint8 (F, H, W, 3) each; `images` are then their latents, or empty.
    """

    images: list[Image.Image] | np.ndarray
    frames: list[np.ndarray] = dataclasses.field(default_factory=list)


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
        trainable = trained(path, trainable, average=config.optimizer.ema > 0)
    make = choose(PIPELINES, config.objective, 'config.objective')
    return make(config, graphdef, nnx.merge_state(trainable, frozen), mesh)


class Pipeline:
    """Draws what is asked. Image i of a call has the noise of fold_in(key(seed), i)."""

    def __init__(self, config: ConfigDict, graphdef, state: nnx.State, mesh: Mesh):
        self.config, self._graphdef, self._state, self._mesh = config, graphdef, state, mesh
        self._readers = build_readers(config)
        self._geometry = Geometry.of(config, nnx.merge(graphdef, state))
        whole = NamedSharding(mesh, P())
        static = ('solver', 'guidance', 'callback')
        self._plan = jax.jit(self._plan, static_argnames='latents')
        self._solve = jax.jit(self._solve, static_argnames=static, out_shardings=whole)
        self._features = jax.jit(self._features, out_shardings=whole)
        self._decode = jax.jit(self._decode, out_shardings=whole)
        self._encode = jax.jit(self._encode, out_shardings=whole)
        self._look = jax.jit(self._look, out_shardings=whole)

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
        negative_prompt: str | None = None,
        seed: int = 0,
        num_images: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        image: Image.Image | np.ndarray | None = None,
        noise: np.ndarray | None = None,
        callback: Callable | None = None,
        output: str = 'pil',
    ) -> Output:
        """`image`: the first frame of a video, or what is to be edited: one picture or several.
        `noise`: initial latents, (B, H, W, C) of pictures, (B, T, H, W, C) of videos.
        `callback(t, latents)` is called at each step.
        """
        images = image if isinstance(image, list | tuple) else [] if image is None else [image]
        prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
        images = [np.asarray(image) for image in images]
        latents = self.sample(
            [self.record(prompt, images) for prompt in prompts],
            indices=range(len(prompts)),
            seed=seed,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            size=(height, width),
            frames=frames,
            noise=noise,
            callback=callback,
        )
        video = latents.shape[1] > 1
        if output == 'latent':
            return Output(latents if video else latents[:, 0])
        pixels = self.decode(latents)
        if video:
            return Output([], frames=list(pixels))
        pixels = pixels[:, 0]
        return Output(pixels if output == 'np' else [Image.fromarray(image) for image in pixels])

    # ------------------------------------------------------------ in batches

    def frames(self, frames: int | None = None, task: str | None = None) -> int:
        """Of what it draws where so many, or as many as it likes, are asked for."""
        return self._geometry.frames(frames, task)

    def record(
        self,
        prompt: str,
        images: Sequence[np.ndarray] = (),
        references: Sequence[np.ndarray] = (),
        video: tuple[np.ndarray, float] | None = None,
    ) -> Record:
        """What is asked; images, uint8 (H, W, 3), are what is to be edited, or a first frame, as
        this system takes them; a video to edit is its frames and their rate.
        """
        return self._geometry.record(prompt, images, references, video)

    def sample(
        self,
        records: Sequence[Record],
        *,
        indices: Sequence[int],
        seed: int,
        task: str | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size = (None, None),
        frames: int | None = None,
        noise: np.ndarray | None = None,
        callback: Callable | None = None,
    ) -> np.ndarray:
        """Latents (B, T, H, W, C); record j has the noise of index `indices[j]`.

        All are of one task, by default what the first one's pictures say. Where `size` does not
        say how large the result is, the picture to be edited may.
        """
        asked = self._geometry.job(self._readers, records, task, size, frames)
        latents, default = asked.latents, self.config.sample
        if noise is None:
            z_1 = self._noise(indices, seed, latents)
        else:
            z_1 = self._geometry.noise(noise, latents)
        given, visual = self._given(asked)
        guidance = default.guidance if guidance is None else guidance
        against = default.get('negative_prompt') if negative_prompt is None else negative_prompt
        plans = self._plans(asked, against or '', guidance, indices, seed)
        solver = choose(SOLVERS, default.solver, 'config.sample.solver')
        z = self._solve(
            self._state,
            plans,
            self._put(z_1),
            self._put(given),
            self._put(visual),
            solver.times(steps or default.steps, self._geometry.shift(solver, latents)),
            solver=solver.solve,
            guidance=float(guidance),
            callback=callback,
        )
        return np.asarray(z)

    def given_noise(
        self,
        noise: np.ndarray,
        record: Record,
        size: Size = (None, None),
        frames: int | None = None,
    ) -> np.ndarray:
        """As (B, T, H, W, C)."""
        return self._geometry.noise(noise, self._geometry.latents(size, frames, record))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Frames (B, F, H, W, 3) uint8; a picture is one."""
        with jax.set_mesh(self._mesh):
            pixels = self._decode(self._state, jnp.asarray(latents))
        return np.asarray(jnp.clip(jnp.round(pixels * 127.5 + 127.5), 0, 255), np.uint8)

    def canvas_features(
        self,
        records: Sequence[Record],
        *,
        indices: Sequence[int],
        seed: int,
        task: str | None = None,
        frames: int | None = None,
    ) -> np.ndarray:
        """What the canvas adds to the latents half-way to the picture: (B, T, h, w, D) (App. I);
        nothing to frames that are given.

        Half-way along Euler's steps, whatever the solver.
        """
        if not self.has_canvas:
            raise InputError(
                'this model has no canvas (config.canvas.fuse is none): nothing to map'
            )
        asked = self._geometry.job(self._readers, records, task, frames=frames)
        default = self.config.sample
        latents = asked.latents
        solver = choose(SOLVERS, default.solver, 'config.sample.solver')
        times = schedule(default.steps, self._geometry.shift(solver, latents))
        middle = int(jnp.argmin(jnp.abs(times - 0.5)))
        plans = self._plans(asked, '', default.guidance, indices, seed)
        z_1 = self._put(self._noise(indices, seed, latents))
        given, visual = self._given(asked)
        visual = self._put(visual)
        z = self._solve(
            self._state,
            plans,
            z_1,
            self._put(given),
            visual,
            jnp.maximum(times, times[middle]),  # a standstill from there: the program that draws
            solver=SOLVERS['euler'].solve,
            guidance=float(default.guidance),
            callback=None,
        )
        return np.asarray(self._features(self._state, plans[0], visual, z, times[middle]))

    # ------------------------------------------------------------ programs

    def _model(self, state) -> MetaCanvas:
        return nnx.merge(self._graphdef, state)

    def _plan(self, state, texts, *, latents):
        return self._model(state).plan(texts, latents)

    def _solve(self, state, plans, z_1, given, visual, times, *, solver, guidance, callback):
        """The whole sampler is one program. `plans`: of what is asked, and of its opposite."""
        model = self._model(state)

        def velocity(z, t_BT, plan):
            if callback is not None:
                io_callback(callback, None, jnp.max(t_BT), z[: len(z_1)], ordered=True)
            branches = len(z) // len(z_1)
            seen = jax.tree.map(lambda x: jnp.concatenate([x] * branches), visual)
            return model.velocity(z, t_BT, plan, seen)

        held = holding(velocity, given, visual.clean_BT)
        plan, *against = plans
        if against:
            solved = solver(guided(held, plan, *against, scale=guidance), z_1, times)
        else:
            solved = solver(lambda z, t: held(z, t, plan), z_1, times)
        return impose(solved, given, visual.clean_BT)

    def _encode(self, state, pixels):
        return self._model(state).vae.encode(pixels)

    def _look(self, state, visual):
        return self._model(state).look(visual)

    def _decode(self, state, z):
        return self._model(state).vae.decode(z)

    def _features(self, state, plan, visual, z, t):
        model = self._model(state)
        patches = model.patchify(z, plan, visual)
        features = model.canvas.fusion.features(patches, plan.canvas, jnp.full(z.shape[:2], t))
        assert features is not None, 'there is a canvas'
        return jnp.where(visual.clean_BT[:, :, None, None, None] > 0, 0, features)

    # ------------------------------------------------------------ inputs

    def _given(self, asked: Job) -> tuple[np.ndarray, Visual]:
        """Latents (B, T, H, W, C) of which those are given that the Visual beside them says."""
        given = np.zeros((len(asked.records), *asked.latents, self._geometry.channels), np.float32)
        visual = asked.readers.visual(asked.task, asked.records)
        visual = dataclasses.replace(visual, context_images=asked.context)
        if (guidance := self.config.sample.get('embedded_guidance')) is not None:
            guidance_B = np.full(len(asked.records), guidance, np.float32)
            visual = dataclasses.replace(visual, guidance_B=guidance_B)
        with jax.set_mesh(self._mesh):
            if TASKS[asked.task].given == 'first':
                first = [r.first for r in asked.records if r.first is not None]
                given[:, :1] = np.asarray(self._encode(self._state, to_float(first)[:, None]))
            if jax.tree.leaves((asked.context, visual.references_BRHWC, visual.condition_BTHWC)):
                visual = jax.tree.map(np.asarray, self._look(self._state, visual))
        return given, visual

    def _noise(self, indices, seed: int, latents) -> np.ndarray:
        key, shape = jax.random.key(seed), (*latents, self._geometry.channels)
        return np.stack([jax.random.normal(jax.random.fold_in(key, i), shape) for i in indices])

    def _plans(self, asked: Job, against: str, guidance: float, indices, seed: int) -> list[Plan]:
        """The second, of what guidance leads away from, is in the bucket of the first: they run as
        one batch. Guidance of 1 knows no second.
        """
        shown = [asked.readers.show(asked.task, record) for record in asked.records]
        pairs = [*zip(asked.records, shown, strict=True)]
        wanted = [Asked(record.text, shown=media) for record, media in pairs]
        if guidance == 1:
            halves = [slice(None)]
        else:
            halves = [slice(len(wanted)), slice(len(wanted), None)]
            wanted += [Asked(against, negative=True, shown=media) for media in shown]
            indices = [*indices, *indices]
        texts = self._texts(asked.task, wanted, indices, seed)
        return [
            self._plan(
                self._state,
                self._put(jax.tree.map(lambda x: x[half], texts)),  # noqa: B023
                latents=asked.latents,
            )
            for half in halves
        ]

    def _texts(self, task: str, asked: list[Asked], indices: Sequence[int], seed: int) -> Texts:
        """Where the run was trained with plans, the MLLM writes one first, but not about nothing.

        Image i has the plan that the MLLM draws with fold_in(key(seed), i).
        """
        encoder = self._readers.mllm
        rows = [row for row, one in enumerate(asked) if one.text]
        if encoder is not None and encoder.plan_tokens and rows:
            sees = TASKS[task].seen is not None
            answers = self.describer(
                [TASKS[task].prompt(asked[row].text) for row in rows],
                [asked[row].shown for row in rows] if sees else None,
                max_new_tokens=encoder.plan_tokens,
                temperature=self.config.sample.temperature,
                seed=seed,
                indices=[indices[row] for row in rows],
            )
            for row, answer in zip(rows, answers, strict=True):
                asked[row] = dataclasses.replace(asked[row], plan=answer.text)
        return self._readers.texts(task, asked)

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
