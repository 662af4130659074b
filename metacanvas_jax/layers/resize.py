"""Linear interpolation in space (half-pixel) and in time (end points aligned)."""

import jax
import jax.numpy as jnp
import numpy as np


def resize(x, h: int, w: int) -> jax.Array:
    """(..., H, W, D) -> (..., h, w, D), bilinear and half-pixel, in fp32.

    Equals torch's interpolate(align_corners=False). jax's default antialias=True does not when
    shrinking.
    """
    shape = (*x.shape[:-3], h, w, x.shape[-1])
    y = jax.image.resize(x.astype(jnp.float32), shape, 'linear', antialias=False)
    return y.astype(x.dtype)


def temporal_weights(frames: int, keyframes: int) -> np.ndarray:
    """(T, K) matrix of linear interpolation with both ends on a keyframe (Sec. 3.3).

    Keyframe k lies exactly on latent frame k (T-1) / (K-1): the paper's 1, 3, 6, 11, 31 all divide
    the 30 steps of 121 pixel frames. One frame takes keyframe 0.
    """
    if frames == 1 or keyframes == 1:
        return np.eye(1, keyframes, dtype=np.float32).repeat(frames, 0)
    # Integers until the last moment: a float position would miss the keyframes by an ulp.
    low, rest = np.divmod(np.arange(frames) * (keyframes - 1), frames - 1)
    low, rest = np.where(low == keyframes - 1, [low - 1, rest * 0 + frames - 1], [low, rest])
    weights = np.zeros((frames, keyframes), np.float32)
    fraction = rest / (frames - 1)
    weights[np.arange(frames), low] = 1 - fraction
    weights[np.arange(frames), low + 1] += fraction
    return weights


def spread_keyframes(x_BKhwD, frames: int) -> jax.Array:
    """Keyframes to all latent frames."""
    weights_TK = temporal_weights(frames, x_BKhwD.shape[1]).astype(x_BKhwD.dtype)
    # Full precision: tensor-float rounding would move the keyframes themselves.
    return jnp.einsum('TK,BKhwD->BThwD', weights_TK, x_BKhwD, precision='highest')
