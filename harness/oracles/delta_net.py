"""The harness's own gated delta net: float64, NumPy, one token after another, each head by itself.

As its authors define it (https://arxiv.org/abs/2412.06464, equation 10, and transformers' ``Qwen3_5GatedDeltaNet``). A
GGUF holds ``-exp(A)``, and its value heads tiled: head v reads key head v modulo their number.

Letters in shapes: T positions, H hidden size, X channels of the convolution, W taps, D head size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta_net(weights: Mapping[str, Array], settings: Mapping[str, Any], prefix: str, x_TH: Array) -> Array:
    """Return the output ``[T, H]`` of a recurrent layer, of one document's normalised states.

    Args:
        weights: of the model, under GGUF names.
        settings: metadata of the architecture, without its prefix.
        prefix: of the layer's names.
        x_TH: normalised states.
    """
    keys, values = int(settings["ssm.group_count"]), int(settings["ssm.time_step_rank"])
    size, eps = int(settings["ssm.state_size"]), float(settings["attention.layer_norm_rms_epsilon"])
    mixed_TX = _convolved(x_TH @ weights[f"{prefix}attn_qkv.weight"].T, weights[f"{prefix}ssm_conv1d.weight"])
    q, k, v = np.split(_silu(mixed_TX), [keys * size, 2 * keys * size], axis=1)
    z = x_TH @ weights[f"{prefix}attn_gate.weight"].T
    strength = 1 / (1 + np.exp(-(x_TH @ weights[f"{prefix}ssm_beta.weight"].T)))
    step = np.logaddexp(0, x_TH @ weights[f"{prefix}ssm_alpha.weight"].T + weights[f"{prefix}ssm_dt.bias"])
    kept = np.exp(step * weights[f"{prefix}ssm_a"])
    out = np.empty_like(v)
    for head in range(values):
        of_key = slice(head % keys * size, (head % keys + 1) * size)
        of_value = slice(head * size, (head + 1) * size)
        read = recurrence(q[:, of_key], k[:, of_key], v[:, of_value], kept[:, head], strength[:, head])
        normed = read / np.sqrt(np.mean(read**2, axis=1, keepdims=True) + eps) * weights[f"{prefix}ssm_norm.weight"]
        out[:, of_value] = normed * _silu(z[:, of_value])
    return np.asarray(out @ weights[f"{prefix}ssm_out.weight"].T)


def recurrence(q_TD: Array, k_TD: Array, v_TD: Array, kept_T: Array, strength_T: Array) -> Array:
    """Return what one head's queries read of its state, ``[T, D]``, token by token from a state of zeros."""
    state = np.zeros((k_TD.shape[1], v_TD.shape[1]))
    read = np.empty_like(v_TD)
    for place in range(len(v_TD)):
        key, query = (x / np.sqrt(x @ x + 1e-6) for x in (k_TD[place], q_TD[place]))
        state = kept_T[place] * state
        state = state + np.outer(key, strength_T[place] * (v_TD[place] - key @ state))
        read[place] = query @ state / np.sqrt(len(key))
    return read


def _convolved(x_TX: Array, taps_XW: Array) -> Array:
    """Return each channel's products with its last W values, zeros before the first; the last tap is the newest's."""
    width = taps_XW.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x_TX.shape[1])), x_TX])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)
    return np.asarray(np.sum(windows * taps_XW, axis=-1))


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))
