"""Space to depth and back."""

from einops import rearrange


def to_patches(z_BTHWC, patch: int):
    return rearrange(z_BTHWC, 'B T (h p) (w q) C -> B T h w (p q C)', p=patch, q=patch)


def from_patches(x_BThwD, patch: int):
    return rearrange(x_BThwD, 'B T h w (p q C) -> B T (h p) (w q) C', p=patch, q=patch)
