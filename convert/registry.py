"""The families that can be converted, and how to tell which one a checkpoint is."""

from collections.abc import Collection

from convert import (
    clip,
    dc_ae,
    flux,
    flux_ae,
    gemma2,
    qwen2_5_vl,
    sana,
    t5,
    umt5,
    uniworld_connector,
    wan,
    wan_vae,
)
from convert.family import Family, Layout
from metacanvas_jax.types import InputError

FAMILIES: dict[str, Family] = {
    'qwen2_5_vl': qwen2_5_vl.FAMILY,
    'gemma2': gemma2.FAMILY,
    'sana': sana.FAMILY,
    'wan': wan.FAMILY,
    'dc_ae': dc_ae.FAMILY,
    'wan_vae': wan_vae.FAMILY,
    'flux': flux.FAMILY,
    'flux_ae': flux_ae.FAMILY,
    'clip': clip.FAMILY,
    'umt5': umt5.FAMILY,
    't5': t5.FAMILY,  # after UMT5, which has all of its names
    'uniworld_connector': uniworld_connector.FAMILY,
}

# Tensors that name a family without a table, for the message that says what a checkpoint is. The
# first row that fits counts; a family that gets a table leaves this list.
STRANGERS = {
    'qwen2_vl': ('visual.blocks.0.mlp.fc1.weight', 'model.layers.0.self_attn.q_proj.bias'),
    'an older export of sana (take the shards and their index, published beside it)': (
        'adaln_single.linear.weight',
        'transformer_blocks.0.ff.inverted_conv.conv.weight',
    ),
    'sana (native)': ('blocks.0.mlp.inverted_conv.conv.weight',),
    'sana_video': ('transformer_blocks.0.ff.conv_temp.weight',),
    'flux2 or chroma (native)': ('double_blocks.0.img_attn.qkv.weight',),
    'the VAE of Wan2.1 (diffusers)': ('encoder.down_blocks.0.norm1.gamma',),
    'the VAE of Wan2.1 (native)': ('encoder.downsamples.0.residual.0.gamma',),
    'language model of the Llama or Qwen kind': ('model.layers.0.self_attn.q_proj.weight',),
}


def find(component: str) -> Family:
    if component not in FAMILIES:
        raise InputError(f'component {component!r} is unknown; there are: {", ".join(FAMILIES)}')
    return FAMILIES[component]


def find_layout(component: str, names: Collection[str], where: str) -> Layout:
    """The layout in which `names` are published; refuses those of another family by its name."""
    family = find(component)
    for layout in family.layouts.values():
        if all(sign in names for sign in layout.signs):
            return layout
    if (looks := looks_like(names)) is not None:
        raise InputError(f'{where} is no {component}: its names are those of {looks}')
    have = ', '.join(list(names)[:3]) or 'none'
    lacking = ([s for s in layout.signs if s not in names] for layout in family.layouts.values())
    want = ' or '.join(signs[0] for signs in lacking)
    raise InputError(
        f'{where} is no {component} and nothing else known: it lacks {want}; '
        f'{len(names)} tensors, such as {have}'
    )


def looks_like(names: Collection[str]) -> str | None:
    """The family, and where it has several the layout, that the names of a checkpoint tell."""
    for component, family in FAMILIES.items():
        for title, layout in family.layouts.items():
            if all(sign in names for sign in layout.signs):
                return f'{component} ({title})'
    return next((name for name, signs in STRANGERS.items() if all(s in names for s in signs)), None)
