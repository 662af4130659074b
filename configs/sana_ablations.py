"""The paper's Table 3, row by row, in the setting of sana_t2i.py.

    python train.py --config configs/sana_ablations.py:no_timestep --workdir DIR ...

The table is cumulative: each row lacks what the rows above it lack. GenEval of the paper: `full`
68.02, `no_timestep` 67.42, `no_dit_block` 66.39, `no_vanilla_block` 66.19, `before_patchify` 65.34,
`baseline` 64.09 (SANA without a canvas). Table 10 and the MLLM's LoRA are variants of sana_lora.py.
"""

from ml_collections import ConfigDict

from configs import sana_t2i

ROWS = {
    'full': {},
    'no_timestep': dict(time='none'),
    'no_dit_block': dict(time='none', fuse='add'),
    'no_vanilla_block': dict(time='none', fuse='add', align='none'),
    'before_patchify': dict(time='none', fuse='latents', align='none'),
}


def get_config(variant: str = 'full') -> ConfigDict:
    if variant == 'baseline':
        return sana_t2i.get_config('text')
    config = sana_t2i.get_config()
    config.canvas.update(ROWS[variant])
    return config
