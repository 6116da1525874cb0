"""Documents, tokenizers and indexed files to train on, and a digest of what is drawn from them."""

import hashlib
import multiprocessing
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from pipehc.data.batches import Sampler, Splits, batch, open_splits

SEED = 7
DEFAULTS: dict[str, Any] = {"kind": "text", "suffixes": [".py", ".txt"], "tokenizer": "bytes", "validation_fraction": 0.2,
                            "sequence_length": 16, "vocab_size": 256, "seed": SEED}
MEGATRON: dict[str, Any] = {"kind": "megatron", "vocab_size": 1000}


def open_(paths: list, cache: Path, **changes) -> Splits:
    return open_splits(**{**DEFAULTS, "paths": [str(path) for path in paths], "cache": cache, **changes})


def write_documents(folder: Path, count: int = 60) -> dict[str, bytes]:
    """Files of 20 to 200 bytes in nested folders, all different; the content by relative name."""
    source = random.Random(1)
    contents = {}
    for i in range(count):
        name = f"{'abc'[i % 3]}/{i:03}.{'py' if i % 2 else 'txt'}"
        contents[name] = bytes(source.choices(range(32, 127), k=source.randrange(20, 200))) + b" %d" % i
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents[name])
    return contents


def stream(split) -> bytes:
    """The byte stream that the samples were cut from, put together again."""
    samples = [split[i].tolist() for i in range(len(split))]
    assert all(a[-1] == b[0] for a, b in pairwise(samples))  # the last label is the next sample's first input
    return bytes(token for sample in samples for token in sample[:-1]) + bytes(samples[-1][-1:])


def digest(splits: Splits, draws: int = 40) -> str:
    """Of the first batches of a run, as the trainer draws them."""
    result = hashlib.sha256()
    for split in splits[:2]:
        tokens, labels = batch(split, Sampler(len(split), SEED), 0, draws)
        result.update(tokens.numpy().tobytes() + labels.numpy().tobytes())
    return result.hexdigest() + splits.info.fingerprint


def _worker(function: Callable, rank: int, arguments: tuple, barrier, results) -> None:
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, barrier, *arguments)))
    except Exception as error:
        barrier.abort()
        results.put((rank, error))


def in_processes(count: int, function: Callable, *arguments) -> list:
    """What `function(rank, barrier, *arguments)` gives in each of `count` new interpreters (CPUs are shared: be patient)."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_worker, args=(function, rank, arguments, barrier, results), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=400) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(count)]


TEXT = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(add(i, i))\n", "naïve café – ключ\n"] * 20


def train_tokenizer(path: Path, special_tokens: list[str], **post) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False))
    if post.get("truncate"):
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    return tokenizer


def write_indexed_documents(prefix: Path, seed: int, count: int = 50) -> list[np.ndarray]:
    from pipehc.megatron.trainer.data import write_indexed

    source = np.random.default_rng(seed)
    documents = [source.integers(0, 1000, source.integers(5, 90)) for _ in range(count)]
    assert write_indexed(documents, prefix, 1000) == sum(map(len, documents))
    return documents
