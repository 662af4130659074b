"""Qwen2.5-VL with pictures and videos equals transformers' at random weights, layer by layer."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metacanvas_jax.data.media import Media, see_image
from metacanvas_jax.data.prompts import make_prompts
from metacanvas_jax.mllm.config import PRESETS, VisionConfig, read_config
from metacanvas_jax.mllm.positions import mrope_angles
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.mllm.vision import find_places, full_attention
from metacanvas_jax.mllm.windows import VisionBuckets, picture_windows
from metacanvas_jax.sharding import make_mesh, put_batch
from metacanvas_jax.train.objective import next_token
from metacanvas_jax.train.trainable import parameter_sizes
from metacanvas_jax.types import TextBatch
from tests import tiny
from tests.parity.test_qwen_language import QWEN

VISION = VisionConfig(
    depth=4,
    hidden_size=32,
    num_heads=2,
    intermediate_size=40,
    out_hidden_size=64,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    window_size=24,  # three squares of 2 x 2 patches: it divides few of the grids below
    fullatt_block_indexes=(1, 3),
)
BUCKETS = VisionBuckets(pictures=(3, 5), windows=(4, 8, 16))
IMAGE, VIDEO = QWEN.image_token_id, QWEN.video_token_id

# What each row of the batch shows: temporal, row and column patches; with seconds, a video.
ROWS = {
    'text': [],
    'image': [((1, 6, 10), None)],
    'three images': [((1, 2, 14), None), ((1, 8, 8), None), ((1, 10, 6), None)],
    'video': [((3, 6, 8), 0.75)],
    'image and video': [((1, 12, 2), None), ((2, 4, 2), 2.0)],
}


def _config(*, tied: bool = True, window: int = 24):
    vision = dataclasses.replace(VISION, window_size=window)
    return dataclasses.replace(QWEN, tie_word_embeddings=tied, vision=vision)


@functools.cache
def _theirs(**changes):
    """A tiny reference whose every parameter is random."""
    config = _config(**changes)
    values = config.to_json()
    values |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=tiny.PAD)
    text = {k: v for k, v in values.items() if k not in ('vision_config', 'model_type')}
    reference = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=values['vision_config'],
            tie_word_embeddings=config.tie_word_embeddings,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            attn_implementation='eager',
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = 'norm' in name or 'ln_q' in name
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(is_norm + scale * noise)
    return reference


VISION_NAMES = {'merger.fc1': 'merger.mlp.0', 'merger.fc2': 'merger.mlp.2'}
VISION_NAMES['patch_embed'] = 'patch_embed.proj'


def _renamed(tensors: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """transformers' tensors under our paths: kernels transposed, layers stacked."""

    def get(name: str) -> np.ndarray:
        value = tensors[name]
        is_kernel = value.ndim >= 2 and 'embed_tokens' not in name
        return value.reshape(len(value), -1).T if is_kernel else value

    def find(ours: str) -> np.ndarray:
        part, _, path = ours.partition('/')
        *module, leaf = path.split('/')
        if leaf not in ('kernel', 'scale', 'bias'):
            module.append(leaf)
        name, kind = '.'.join(module), 'bias' if leaf == 'bias' else 'weight'
        if name == 'lm_head':
            return get(f'lm_head.{kind}')
        prefix = {'language': 'model.language_model', 'vision': 'model.visual'}[part]
        name = VISION_NAMES.get(name, name)
        for stack, depth in (('layers', 2), ('blocks', VISION.depth)):
            if name.startswith(f'{stack}.'):
                parts = [name.replace(stack, f'{stack}.{i}', 1) for i in range(depth)]
                return np.stack([get(f'{prefix}.{layer}.{kind}') for layer in parts])
        return get(f'{prefix}.{name}.{kind}')

    model = jax.eval_shape(lambda: tiny.qwen(nnx.Rngs(0), None, config))
    return {name: find(name) for name in tiny.named(model)}


@functools.cache
def _ours(**changes) -> Qwen:
    config = _config(**changes)
    tensors = {name: p.detach().numpy() for name, p in _theirs(**changes).named_parameters()}
    return tiny.fill(tiny.qwen(nnx.Rngs(0), None, config), _renamed(tensors, config))


# ------------------------------------------------------------ one batch, for both


@functools.cache
def _batch(rows: tuple[str, ...], window: int = 24):
    """A prompt with our fields, and the keyword arguments of the reference's forward."""
    rng = np.random.default_rng(0)
    config, chats, media = _config(window=window), [], []
    for row in rows:
        ids, shown = rng.integers(0, tiny.PAD, 4).tolist(), []
        for grid, seconds in ROWS[row]:
            tokens = int(np.prod(grid)) // 4
            patches = rng.normal(size=(4 * tokens, VISION.patch_values)).astype(np.float32)
            shown.append(Media(patches, grid, tokens, seconds))
            ids += [IMAGE if seconds is None else VIDEO] * tokens
            ids += rng.integers(0, tiny.PAD, rng.integers(1, 6)).tolist()
        chats.append(ids)
        media.append(shown)
    prompt = make_prompts(
        chats,
        config,
        pad=tiny.PAD,
        buckets=(64,),
        rule='hf5',  # transformers 5; test_positions.py has the other rule
        media=media,
        vision_buckets=BUCKETS,
    )
    kinds = np.where(prompt.ids_BL == IMAGE, 1, np.where(prompt.ids_BL == VIDEO, 2, 0))
    images = [m for shown in media for m in shown if m.seconds_per_grid is None]
    videos = [m for shown in media for m in shown if m.seconds_per_grid is not None]
    theirs = dict(
        input_ids=torch.tensor(prompt.ids_BL).long(),
        attention_mask=torch.tensor(_valid(prompt)).long(),
        mm_token_type_ids=torch.tensor(kinds),
    )
    if images:
        theirs['pixel_values'] = torch.tensor(np.concatenate([m.patches for m in images]))
        theirs['image_grid_thw'] = torch.tensor([m.grid for m in images])
    if videos:
        theirs['pixel_values_videos'] = torch.tensor(np.concatenate([m.patches for m in videos]))
        theirs['video_grid_thw'] = torch.tensor([m.grid for m in videos])
        theirs['second_per_grid_ts'] = torch.tensor([m.seconds_per_grid for m in videos])
    return prompt, theirs, media


def _valid(prompt) -> np.ndarray:
    return np.arange(prompt.ids_BL.shape[1]) < prompt.length_B[:, None]


def _traced(modules, run):
    """(input, output) of each torch module while `run` is called."""
    found = {}

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs['hidden_states']
        out = output[0] if isinstance(output, tuple) else output
        found[module] = (hidden.detach().numpy(), out.detach().numpy())

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return result, [found[module] for module in modules]


@jax.jit
def _every_layer(model: Qwen, prompt):
    """Our passes, keeping what the reference's hooks see."""
    tower, vision = model.vision, prompt.vision
    assert tower
    places = find_places(vision, tower.config)

    def block(x, layer_full):
        layer, full = layer_full
        x = layer(x, places, full)
        return x, x

    x = tower.patch_embed(vision.patches_BIVPX)
    _, seen = jax.lax.scan(block, x, (tower.blocks, full_attention(tower.config)))
    angles = mrope_angles(prompt.positions_B3L, model.config)

    def layer(x, layer):
        x, _ = layer.prefix(x, angles, prompt.length_B)
        return x, x

    embedded = model.embed(prompt)
    _, read = jax.lax.scan(layer, embedded, model.language.layers)
    states, _ = model.prefix(prompt)
    return seen, tower(vision), embedded, read, states, model.language.logits(states)


def _slots(vision) -> np.ndarray:
    """Which slots hold patches; taken in order they are the reference's windows."""
    return np.arange(vision.patches_BIVPX.shape[3]) < vision.length_BIV[..., None]


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('rows', [('text',), ('image',), ('three images',), ('video',), (*ROWS,)])
def test_every_layer_of_the_whole_model(rows, tied):
    """Also with padding on the right, and pictures of odd sizes that no window divides."""
    prompt, inputs, _ = _batch(rows)
    reference = _theirs(tied=tied)
    layers = reference.model.language_model.layers
    theirs, traced = _traced(layers, lambda: reference(**inputs, output_hidden_states=True))
    _, _, embedded, read, states, logits = _every_layer(_ours(tied=tied), prompt)
    valid = _valid(prompt)
    assert tiny.error(embedded[valid], traced[0][0][valid]) <= 1e-5
    for ours, (_, out) in zip(read, traced, strict=True):
        assert tiny.error(ours[valid], out[valid]) <= 1e-5
    assert tiny.error(states[valid], theirs.hidden_states[-1].numpy()[valid]) <= 1e-5
    assert tiny.error(logits[valid], theirs.logits.numpy()[valid]) <= 1e-5


@pytest.mark.parametrize('window', [8, 16, 24, 40])
def test_every_block_of_the_vision_tower(window):
    """One square to a window, some that divide some grids, and one larger than most pictures."""
    prompt, _, media = _batch((*ROWS,), window)
    visual, vision = _theirs(window=window).model.visual, prompt.vision
    assert vision
    patches = torch.tensor(np.concatenate([m.patches for shown in media for m in shown]))
    grids = torch.tensor([m.grid for shown in media for m in shown])
    theirs, traced = _traced(visual.blocks, lambda: visual(patches, grid_thw=grids))
    model = _ours(window=window)
    tower = model.vision
    assert tower
    seen, tokens, *_ = _every_layer(model, prompt)
    slots = _slots(vision)
    for ours, (_, out) in zip(seen, traced, strict=True):
        assert tiny.error(ours[slots], out) <= 1e-5
    found = np.concatenate(
        [
            tokens_JD[token_L[token_L >= 0]]
            for tokens_JD, token_L in zip(np.asarray(tokens), vision.token_BL, strict=True)
        ]
    )
    assert tiny.error(found, theirs.pooler_output.numpy()) <= 1e-5

    # Each block by itself, on what the reference's block was given.
    places = find_places(vision, tower.config)
    run = jax.jit(lambda block, x, full: block(x, places, full))
    for i, full in enumerate(full_attention(tower.config)):
        x = np.zeros((*slots.shape, VISION.hidden_size), np.float32)
        x[slots] = traced[i][0]
        out = run(jax.tree.map(lambda a, i=i: a[i], tower.blocks), x, full)
        assert tiny.error(np.asarray(out)[slots], traced[i][1]) <= 1e-5


def test_gradients_of_a_text_loss():
    """Every parameter of both towers, in a batch of everything."""
    prompt, inputs, _ = _batch((*ROWS,))
    valid = _valid(prompt)
    weight_BL = np.float32(valid & (prompt.ids_BL < tiny.PAD))
    batch = TextBatch(prompt=prompt, weight_BL=weight_BL)
    graphdef, state = nnx.split(_ours(tied=False))
    loss, grads = jax.jit(
        jax.value_and_grad(lambda s: next_token(nnx.merge(graphdef, s), batch, jax.random.key(0)))
    )(state)

    reference = _theirs(tied=False)
    reference.zero_grad()
    logits = reference(**inputs).logits[:, :-1]
    targets = torch.tensor(np.where(weight_BL > 0, prompt.ids_BL, -100)[:, 1:]).long()
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    their_loss.backward()
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5)
    theirs = {name: np.asarray(p.grad) for name, p in reference.named_parameters()}
    theirs = _renamed(theirs, _config(tied=False))
    ours = tiny.named(nnx.merge(graphdef, grads))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert tiny.error(gradient, theirs[name]) <= 1e-4, name


# ------------------------------------------------------------ laws

prefix = jax.jit(lambda model, prompt: model.prefix(prompt)[0])


def test_padding_is_inert():
    """Whatever stands in empty slots, and however many of them there are."""
    prompt, _, media = _batch((*ROWS,))
    vision, valid = prompt.vision, _valid(prompt)
    assert vision
    states = prefix(_ours(), prompt)[valid]
    patches = np.where(_slots(vision)[..., None], vision.patches_BIVPX, 1e3)
    noisy = prompt.replace(vision=vision.replace(patches_BIVPX=patches.astype(np.float32)))
    np.testing.assert_array_equal(prefix(_ours(), noisy)[valid], states)

    chats = [ids[:n].tolist() for ids, n in zip(prompt.ids_BL, prompt.length_B, strict=True)]
    larger = make_prompts(
        chats,
        _config(),
        pad=tiny.PAD,
        buckets=(70,),
        rule='hf5',
        media=media,
        vision_buckets=VisionBuckets((6,), (9,)),
    )
    assert tiny.error(prefix(_ours(), larger)[_valid(larger)], states) <= 1e-5


def test_rows_do_not_see_each_other():
    """Each row alone has the states that it has in the batch."""
    prompt, _, _ = _batch((*ROWS,))
    states = np.asarray(prefix(_ours(), prompt))
    for row, length in enumerate(prompt.length_B):
        alone = jax.tree.map(lambda a, row=row: a[row : row + 1], prompt)
        assert tiny.error(prefix(_ours(), alone)[0, :length], states[row, :length]) <= 1e-5


def test_text_alone_is_the_program_it_was():
    """No vision in it: the same operations as in a model that has no vision tower."""
    prompt = tiny.prompt()
    blind = dataclasses.replace(_config(), vision=None)
    arrays = {k: np.asarray(v) for k, v in tiny.named(_ours()).items() if 'vision/' not in k}
    blind = tiny.fill(tiny.qwen(nnx.Rngs(0), None, blind), arrays)
    np.testing.assert_array_equal(prefix(blind, prompt), prefix(_ours(), prompt))

    def operations(jaxpr) -> list[str]:
        return [
            name
            for eqn in jaxpr.eqns
            for name in (
                eqn.primitive.name,
                *(n for sub in jaxprs_in_params(eqn.params) for n in operations(sub)),
            )
        ]

    found = [operations(prefix.trace(model, prompt).jaxpr.jaxpr) for model in (blind, _ours())]
    assert found[0] == found[1]
    assert len(found[0]) > 20


def test_one_compile_for_ten_sizes():
    """Pictures from 8 x 8 to 40 x 30 pixels, in prompts of one bucket."""
    config, rng = _config(), np.random.default_rng(0)
    run = jax.jit(lambda model, prompt: model.prefix(prompt)[0])
    grids, last = set(), None
    for _ in range(10):
        pixels = rng.integers(0, 256, (*rng.integers((8, 8), (41, 31)), 3), dtype=np.uint8)
        shown = see_image(pixels, config, min_pixels=64, max_pixels=1600)
        grids.add(shown.grid)
        prompt = make_prompts(
            [[3, *[IMAGE] * shown.tokens, 4]],
            config,
            pad=tiny.PAD,
            buckets=(40,),
            media=[[shown]],
            vision_buckets=VisionBuckets((1,), (4,)),
        )
        states = np.asarray(run(_ours(), prompt))
        assert np.isfinite(states).all()
        assert last is None or np.any(states[0, -1] != last)
        last = states[0, -1]
    assert len(grids) > 6
    assert run._cache_size() == 1


def test_a_batch_is_split_over_devices():
    """Data parallel: each device looks at its own rows' pictures, and nothing is exchanged."""
    prompt, _, _ = _batch(('image', 'text', 'video', 'three images') * 2)
    alone = np.asarray(prefix(_ours(), prompt))
    mesh = make_mesh()
    model = jax.device_put(_ours(), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        split = put_batch(prompt, mesh)
        program = prefix.lower(model, split).compile()
        states = prefix(model, split)
    assert [a.data.shape[0] for a in states.addressable_shards] == [1] * 8
    assert tiny.error(states, alone) <= 1e-5
    assert not re.findall('all-gather|all-reduce|all-to-all|permute', program.as_text())


@pytest.mark.parametrize(
    ('size', 'vision', 'language'),
    # The tensors of the published checkpoints.
    [('3b', 668_684_288, 3_085_938_688), ('7b', 676_550_144, 7_615_616_512)],
)
def test_full_size(size, vision, language):
    make = lambda: Qwen(PRESETS[size], None, remat='full', dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    sizes = parameter_sizes(jax.eval_shape(make))
    for part, count in (('vision/', vision), ('language/', language)):
        assert sum(n for name, n in sizes.items() if name.startswith(part)) == count


@pytest.mark.parametrize('size', [size for size in PRESETS if PRESETS[size].vision])
def test_sizes_are_read_from_both_layouts(tmp_path, size):
    """The published flat config.json, which says in_chans, and transformers 5's nested one."""
    values = PRESETS[size].to_json()
    Qwen2_5_VLConfig(**values, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    assert 'text_config' in json.loads((tmp_path / 'config.json').read_text())
    assert read_config(tmp_path) == PRESETS[size]
    values['vision_config']['in_chans'] = values['vision_config'].pop('in_channels')
    (tmp_path / 'config.json').write_text(json.dumps(values))
    assert read_config(tmp_path) == PRESETS[size]


# ------------------------------------------------------------ windows


@pytest.mark.parametrize(('rows', 'columns'), [(2, 2), (6, 6), (8, 12), (14, 2), (10, 16)])
def test_windows_hold_every_patch_once(rows, columns):
    windows = picture_windows(rows, columns, _config())
    assert windows.shape == (-(-rows // 6) * -(-columns // 6), 36)
    np.testing.assert_array_equal(np.sort(windows[windows >= 0]), np.arange(rows * columns))
    for window in windows:
        count = (window >= 0).sum()
        assert count
        assert (window[:count] >= 0).all()  # empty slots are at the end
