"""Time of one prefix pass of Qwen2.5-VL beside transformers', eager and compiled, in one run.

    python -m bench.qwen_prefix [--size=7b] [--tokens=2048] [--pixels=1024] [--output=FILE.json]

Random bf16 weights and a random picture; a prompt of so many tokens, the picture's among them. The
peers run where torch has a GPU. Seconds are of the whole pass with its vision tower, from pixels
and ids on the host.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metacanvas_jax.data.media import see_image
from metacanvas_jax.data.prompts import make_prompts
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.mllm.windows import VisionBuckets, picture_windows
from metacanvas_jax.types import Prompt

PACKAGES = ('jax', 'flax', 'transformers', 'torch')


def make_inputs(size: str, tokens: int, pixels: int) -> Prompt:
    config = PRESETS[size]
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    shown = see_image(picture, config, min_pixels=pixels**2 // 2, max_pixels=2 * pixels**2)
    words = rng.integers(0, 500, tokens - shown.tokens).tolist()
    ids = [*words[:8], *[config.image_token_id] * shown.tokens, *words[8:]]
    windows = len(picture_windows(*shown.grid[1:], config))
    return make_prompts(
        [ids],
        config,
        pad=0,
        buckets=(tokens,),
        media=[[shown]],
        vision_buckets=VisionBuckets(pictures=(1,), windows=(windows,)),
    )


def measure(run: Callable[[], object], repeats: int) -> dict[str, float | int]:
    run()  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        'median_s': statistics.median(seconds),
        'min_s': min(seconds),
        'max_s': max(seconds),
        'repeats': repeats,
    }


def ours(size: str, prompt: Prompt, repeats: int) -> dict[str, float | int]:
    def make(key) -> Qwen:
        model = Qwen(
            PRESETS[size], None, remat='none', dtype=jnp.bfloat16, rngs=nnx.Rngs(params=key)
        )
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    model = jax.jit(make)(jax.random.key(0))
    program = jax.jit(lambda model, prompt: model.prefix(prompt)[0])
    return measure(lambda: program(model, prompt).block_until_ready(), repeats)


def theirs(size: str, prompt: Prompt, repeats: int) -> dict[str, dict[str, float | int]]:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if not torch.cuda.is_available():
        return {}
    config = PRESETS[size]
    values = config.to_json()
    text = {
        key: value for key, value in values.items() if key not in ('vision_config', 'model_type')
    }
    torch.set_default_dtype(torch.bfloat16)
    with torch.device('cuda'):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text,
                vision_config=values['vision_config'],
                tie_word_embeddings=config.tie_word_embeddings,
                image_token_id=config.image_token_id,
                video_token_id=config.video_token_id,
                attn_implementation='sdpa',  # pyright: ignore[reportCallIssue]
            )
        ).eval()
    assert prompt.vision is not None
    vision = prompt.vision
    valid = np.arange(vision.patches_BIVPX.shape[3]) < vision.length_BIV[..., None]
    patches = vision.patches_BIVPX[valid]  # in window order: the same number, which is what counts
    ids = prompt.ids_BL
    side = int(len(patches) ** 0.5)
    inputs = dict(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        mm_token_type_ids=torch.tensor(ids == config.image_token_id).long(),
        pixel_values=torch.tensor(patches).bfloat16(),
        image_grid_thw=torch.tensor([[1, side, side]]),
    )

    def run(module) -> None:
        with torch.no_grad():
            module(**{name: value.cuda() for name, value in inputs.items()}, use_cache=True)
        torch.cuda.synchronize()

    compiled = torch.compile(model.model)
    return {
        'transformers eager': measure(lambda: run(model.model), repeats),
        'transformers compiled': measure(lambda: run(compiled), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', default='7b', choices=PRESETS)
    parser.add_argument('--tokens', type=int, default=2048)
    parser.add_argument('--pixels', type=int, default=1024)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    prompt = make_inputs(args.size, args.tokens, args.pixels)
    result = {
        'what': f'Qwen2.5-VL-{args.size} prefix, {args.tokens} tokens, one {args.pixels}^2 picture',
        'device': jax.devices()[0].device_kind,
        'python': platform.python_version(),
        'versions': {name: _version(name) for name in PACKAGES},
        'settings': {'dtype': 'bfloat16', 'weights': 'random', 'batch': 1},
        'seconds': {'ours': ours(args.size, prompt, args.repeats)}
        | theirs(args.size, prompt, args.repeats),
    }
    text = json.dumps(result, indent=2) + '\n'
    print(text, end='')
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == '__main__':
    main()
