"""Maps of the canvas features: first three principal components as colours (App. I)."""

import numpy as np


def pca_map(features_hwD: np.ndarray) -> np.ndarray:
    """(h, w, D) -> (h, w, 3) in [0, 1]. Colours compare only inside one map.

    A component's sign is arbitrary; it is fixed so that its largest loading is positive.
    """
    h, w, D = features_hwD.shape
    x = np.asarray(features_hwD, np.float32).reshape(h * w, D)
    _, _, loadings = np.linalg.svd(x - x.mean(0), full_matrices=False)
    loadings = np.concatenate([loadings[:3], np.zeros((3, D), np.float32)])[:3]
    largest = np.abs(loadings).argmax(1)
    loadings *= np.where(loadings[np.arange(3), largest] < 0, -1, 1)[:, None]
    scores = (x - x.mean(0)) @ loadings.T
    low, span = scores.min(0), np.ptp(scores, 0)
    return ((scores - low) / np.where(span > 0, span, 1)).reshape(h, w, 3)
