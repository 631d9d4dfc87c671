"""Reading a cache of teacher signals: windows in any order, from shards that are checked and then mapped."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.mapped import WatchedFile
from q4kd.trainer.teacher.cache.signal import TopKSignal, normalise
from q4kd.trainer.teacher.cache.store import CacheIndex, damaged, id_dtype


class CacheReader:
    """Reads signals of windows in any order. Each shard is checked by digest once, and mapped from then on.

    Raises:
        InputError: when the cache is not complete.
    """

    def __init__(self, index: CacheIndex) -> None:
        if not index.is_complete:
            expected, remedy = f"{index.num_shards} shards", "finish it: run q4kd cache again with the same arguments"
            raise InputError(str(index.folder), expected=expected, got=str(len(index.shards)), remedy=remedy)
        self.index = index
        self._open: dict[int, tuple[WatchedFile, Any]] = {}

    def read(self, windows_B: npt.NDArray[np.int64]) -> TopKSignal:
        """Return the signal of whole windows, M = B x T, each position made to sum to one.

        Raises:
            InputError: when a shard is missing, changed or not what its name says.
            FileChangedError: when one was changed since it was first read.
        """
        per_shard = self.index.windows_per_shard
        places = [divmod(int(window), per_shard) for window in windows_B]

        def part(name: str) -> Tensor:
            slices = [self._shard(shard).get_slice(name)[place] for shard, place in places]
            return torch.from_numpy(np.concatenate(slices))

        ids_MK = part("ids").long()
        try:
            if int(ids_MK.max()) >= self.index.key.rows:
                raise ValueError(f"token id {int(ids_MK.max())}")
            return normalise(ids_MK, part("log_probs").float(), part("tail").float())
        except ValueError as error:
            path = self.index.folder / self.index.name(places[0][0])
            raise damaged(path, f"distributions over {self.index.key.rows} tokens", str(error)) from error

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            shard = self._load(number)
            name = self.index.name(number)
            self._open[number] = WatchedFile(self.index.folder / name, self.index.shards[name]["sha256"]), shard
        file, shard = self._open[number]
        file.check_unchanged()
        return shard

    def _load(self, number: int) -> Any:
        index = self.index
        path = index.check_shard(number)
        shape = [len(index.windows_of(number)), index.key.seq_len]
        ids = {torch.uint16: "U16", torch.uint32: "U32"}[id_dtype(index.key.rows)]
        wanted = {"ids": ([*shape, index.k], ids), "log_probs": ([*shape, index.k], "F16"), "tail": (shape, "F16")}
        try:
            shard: Any = safe_open(path, framework="np")
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - not a mapping
            found = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path, "safetensors", str(error)[:100]) from error
        if found != wanted:
            raise damaged(path, str(wanted), str(found)[:200])
        return shard
