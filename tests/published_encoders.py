"""Tiny autoencoders and text encoders of FLUX and Wan as published, with random weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter is random: the norms' around one, of both signs, others keep the size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith('weight') and parameter.ndim == 1:
                parameter.copy_(1 + noise)
            elif 'relative_attention_bias' in name or 'embed' in name or 'shared' in name:
                parameter.copy_(noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
                parameter.copy_(fan_in**-0.5 * noise)
    return module.eval()


# ------------------------------------------------------------ autoencoder

AE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=5,
    block_out_channels=(8, 12, 12),  # the second stage keeps its channels, as the last of FLUX
    layers_per_block=2,
    norm_num_groups=4,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
AES = {
    'three stages': AE,
    # As many groups as the other layout always has.
    'bfl': AE | dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32),
}


def autoencoder(name: str) -> Any:
    config = AES[name]
    stages = len(config['block_out_channels'])
    model: Any = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * stages,
        up_block_types=('UpDecoderBlock2D',) * stages,
        **config,
    )
    randomise(model)
    with torch.no_grad():  # so small that the first norm's epsilon is seen
        for half in (model.encoder, model.decoder):
            half.conv_in.weight.mul_(0.01)
            half.conv_in.bias.mul_(0.01)
    return model


# ------------------------------------------------------------ text encoders

CLIP: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=11,
    layer_norm_eps=1e-3,  # large enough to be seen
    bos_token_id=0,
    eos_token_id=2,
    attn_implementation='eager',
)


def clip(**changes) -> Any:
    return randomise(CLIPTextModel(CLIPTextConfig(**(CLIP | changes))))


T5: dict[str, Any] = dict(
    vocab_size=61,
    d_model=24,
    d_kv=10,  # not 24 / 3
    d_ff=40,
    num_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    layer_norm_epsilon=1e-3,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    attn_implementation='eager',
)
T5S = {'t5': (T5EncoderModel, T5Config), 'umt5': (UMT5EncoderModel, UMT5Config)}


def t5(kind: str, **changes) -> Any:
    model, config = T5S[kind]
    return randomise(model(config(**(T5 | changes))))
