"""Trains the demo teacher in float32 and leaves a Hugging Face checkpoint that the packaging stage reads."""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from transformers import Qwen2Config, Qwen2ForCausalLM

from q4kd.trainer.demo.corpus import read_texts, token_stream, train_tokenizer, windows
from q4kd.trainer.files import write_atomic, write_json

VOCAB = 2048
CONTEXT = 256
PEAK_LR = 2e-3
WARMUP = 0.02
SAVE_EVERY_S = 180.0


def qwen2_config(*, hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int) -> Qwen2Config:
    """Return a small qwen2 configuration: tied head, rope base 10 000, eps 1e-6, 512 positions, ``VOCAB`` tokens."""
    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def teacher_config() -> Qwen2Config:
    """Return the teacher's: 5.2 M parameters, every matrix a multiple of 256 columns wide, which K-quants need."""
    return qwen2_config(hidden=256, layers=6, heads=4, kv_heads=2, feed_forward=768)


def student_config() -> Qwen2Config:
    """Return that of the student that ships beside it, without weights: 0.7 M parameters, the same vocabulary."""
    return qwen2_config(hidden=128, layers=2, heads=4, kv_heads=2, feed_forward=384)


def fresh_model(config: Qwen2Config) -> Qwen2ForCausalLM:
    """Draw matrices from N(0, 0.05), and those that write into the residual stream from N(0, 0.05 / sqrt(2 layers)).

    transformers' 0.02 is meant for wide models; at a width of 256 the loss fell visibly later with it.
    """
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0, 0.05 / (math.sqrt(2 * config.num_hidden_layers) if into_stream else 1))
    return model


def held_out_loss(
    model: Qwen2ForCausalLM, windows_NT: npt.NDArray[np.int32], sizes_V: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Return the next-token loss, ``nats_per_token`` and ``bits_per_byte``, and the ``tokens`` and ``bytes`` predicted.

    Windows are int32 ``[n, length + 1]``; ``sizes_V`` are the bytes of text behind each token id.
    """
    model.train(False)
    nats, tokens, size = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(windows_NT), 16):
            batch = torch.from_numpy(windows_NT[start : start + 16].astype(np.int64))
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            labels = batch[:, 1:]
            nats += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += labels.numel()
            size += int(sizes_V[labels.numpy()].sum())
    loss = {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size}
    return loss | {"tokens": tokens, "bytes": size}


def _progress_lr(progress: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine to 2 % of the peak; ``progress`` runs from 0 to 1."""
    if progress < WARMUP:
        return PEAK_LR * max(progress, 0.001) / WARMUP
    return PEAK_LR * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))))


def train(folder: Path, corpus: Path, *, steps: int | None, minutes: float, batch: int, seed: int) -> None:
    """Train and save to ``folder``: config.json, model.safetensors, tokenizer.json, training.json.

    With ``steps`` the schedule follows the step count and the run is reproducible; without, it follows the clock, so
    that a busy machine still ends on time with the learning rate fully decayed. ``folder`` is refreshed every 3 min.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    texts = read_texts(corpus, held_out=False)
    tokenizer = train_tokenizer(texts, VOCAB)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    stream = token_stream(tokenizer, texts)
    print(f"{len(texts)} files, {sum(map(len, texts))} characters, {len(stream)} training tokens", flush=True)

    model = fresh_model(teacher_config())
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))

    generator = np.random.default_rng(seed)
    began = saved = time.monotonic()
    training: dict[str, Any] = {
        "seed": seed,
        "batch": batch,
        "context": CONTEXT,
        "peak_lr": PEAK_LR,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_available": len(stream),
        "schedule": "clock" if steps is None else "steps",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "finished": False,
    }

    def save() -> None:
        model.save_pretrained(folder)
        write_json(folder / "training.json", training)

    step, order, shown = 0, np.empty((0, CONTEXT + 1), dtype=np.int32), 0.0
    while True:
        elapsed = time.monotonic() - began
        progress = elapsed / (60 * minutes) if steps is None else step / steps
        if progress >= 1:
            break
        if len(order) < batch:  # A new epoch is cut at a new offset.
            cut = windows(stream[int(generator.integers(CONTEXT)) :], CONTEXT)
            order = cut[generator.permutation(len(cut))]
        rows, order = torch.from_numpy(order[:batch].astype(np.int64)), order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = _progress_lr(progress)
        model.train()
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        training |= {"steps": step, "tokens": step * batch * CONTEXT, "seconds": round(time.monotonic() - began, 1)}
        shown = loss.item() if step == 1 else 0.95 * shown + 0.05 * loss.item()
        if step <= 10 or step % 25 == 0:
            rate = training["tokens"] / training["seconds"]
            print(f"step {step} loss {loss.item():.3f} mean {shown:.3f} {rate:.0f} tok/s {progress:.1%}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            save()
    training |= {"finished": True, "load_average": round(os.getloadavg()[0], 1)}
    save()
    print(json.dumps(training), flush=True)
