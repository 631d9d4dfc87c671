"""The CUDA kernels of gated delta nets, declared as the teacher's are (see ``plans.py``); ``src/states.cu`` has them.

Letters in shapes: M tokens, T positions, X channels of the convolution, W taps, K key heads, V value heads, D head
size.
"""

import torch
from torch import Tensor

from q4kd.trainer.kernels.launch import Argument
from q4kd.trainer.kernels.plans import DTYPES, KernelSet, Launch, blocks, kernel, require

_ANY = tuple(DTYPES)
_F32, _I64 = (torch.float32,), (torch.int64,)


class StateKernels(KernelSet):
    """Every kernel of gated delta nets, for one device.

    Every method raises ``ValueError`` for arguments that do not fit: another shape, dtype, layout or device than it
    says.
    """

    @kernel
    def convolve(
        self,
        x_MX: Tensor,
        taps_WX: Tensor,
        starts_M: Tensor | None,
        positions: int,
        head_dim: int,
        unit: int,
        eps: float,
        out_MX: Tensor,
    ) -> Launch:
        """Write SiLU of the causal convolution of each channel; of the first ones, each head divided by its length.

        Args:
            x_MX: bfloat16 or float32; rows may be apart (columns of a wider product).
            taps_WX: float32, contiguous; the last is that of the token itself.
            starts_M: int64, contiguous, the first position of each token's document; None where a row is one document.
            positions: T; row m is position ``m % T``.
            head_dim: D.
            unit: channels of queries and keys, ``2 * K * D``.
            eps: added to a head's sum of squares.
            out_MX: float32, contiguous.
        """
        self._check("x", x_MX, _ANY, None, None, rows=True)
        tokens, channels = x_MX.shape
        self._check("taps", taps_WX, _F32, None, channels)
        self._check("out", out_MX, _F32, tokens, channels)
        if starts_M is not None:
            self._check("starts", starts_M, _I64, tokens)
        require(positions > 0 and tokens % positions == 0, f"{tokens} rows of {positions} positions")
        fits = head_dim > 0 and channels % head_dim == 0 and unit % head_dim == 0 and 0 <= unit <= channels
        require(fits, f"{channels} channels, {unit} of unit heads: expected whole heads of {head_dim}")
        require(len(taps_WX) > 0, "taps: expected at least one")
        arguments: list[Argument] = [x_MX, x_MX.stride(0), taps_WX, len(taps_WX), starts_M, positions, channels]
        arguments += [head_dim, unit, float(eps), tokens, out_MX]
        threads = 32 * tokens * (channels // head_dim)
        return Launch(f"convolve_{DTYPES[x_MX.dtype]}", blocks(threads), arguments, [out_MX])

    @kernel
    def gate(self, x_MVD: Tensor, z_MA: Tensor, weight_D: Tensor, eps: float, out_MA: Tensor) -> Launch:
        """Write ``x / sqrt(mean(x^2) + eps) * weight * silu(z)``, each head by itself, rounded once.

        Args:
            x_MVD: float32, contiguous.
            z_MA: bfloat16 or float32 ``[M, V * D]``; rows may be apart.
            weight_D: float32.
            eps: added to the mean squares.
            out_MA: the type of ``z``, ``[M, V * D]``, contiguous.
        """
        self._check("x", x_MVD, _F32, None, None, None)
        tokens, heads, head_dim = x_MVD.shape
        self._check("z", z_MA, _ANY, tokens, heads * head_dim, rows=True)
        self._check("weight", weight_D, _F32, head_dim)
        self._check("out", out_MA, [z_MA.dtype], tokens, heads * head_dim)
        arguments: list[Argument] = [x_MVD, z_MA, z_MA.stride(0), weight_D, heads, head_dim, float(eps), tokens, out_MA]
        threads = 32 * tokens * heads if head_dim else 0
        return Launch(f"states_{DTYPES[z_MA.dtype]}", blocks(threads), arguments, [out_MA])
