"""MetaCanvas (arXiv 2512.11464) in JAX."""

from metacanvas_jax.describe import Answer as Answer
from metacanvas_jax.describe import Describer as Describer
from metacanvas_jax.pipeline import Output as Output
from metacanvas_jax.pipeline import Pipeline as Pipeline
from metacanvas_jax.pipeline import load as load
