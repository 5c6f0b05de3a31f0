"""How alike two pictures are."""

from __future__ import annotations

import numpy as np

SAME = 99.0
"""PSNR that is reported for equal pictures, dB."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, dB."""
    mse = float(np.square(a.astype(np.float64) - b).mean())
    return SAME if mse == 0 else 10 * float(np.log10(255**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3] (Wang et al. 2004: grey, windows of 8×8, mean over the picture)."""
    x, y = (p.astype(np.float64) @ (0.299, 0.587, 0.114) for p in (a, b))
    h, w = (n // 8 * 8 for n in x.shape)
    u, v = (p[:h, :w].reshape(h // 8, 8, w // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 64) for p in (x, y))
    mu, nu = u.mean(1), v.mean(1)
    covariance = ((u - mu[:, None]) * (v - nu[:, None])).mean(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mu * nu + c1) * (2 * covariance + c2) / ((mu**2 + nu**2 + c1) * (u.var(1) + v.var(1) + c2))
    return float(score.mean())
