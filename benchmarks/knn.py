"""Exact k-NN: our search beside the bare matrix product of bank and queries, and beside scikit-learn's brute force.

    python benchmarks/knn.py [--bank 200000] [--queries 5000] [--width 1280] [--rounds 3]

The bars: at most 1.5 times the matrix product, no slower than scikit-learn. Rounds are interleaved; medians. On two cores a
round of the whole takes about two minutes; OMP_NUM_THREADS decides the cores of all of them alike.

    python benchmarks/knn.py --stream --bank 1281167 --queries 50000 [--device cuda]

ImageNet's size: the bank is drawn block by block and never held; prints seconds of search and the peak of memory.
"""

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import faiss
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

import radio_cache
from evals.knn.search import NeighbourSearch

K = 20
PIECE_ROWS = 1 << 14
"""What the commands hand over at once of a cached teacher."""

Rows = NDArray[np.float32]


def features(count: int, width: int, seed: int) -> Rows:
    """Unit rows around 1,000 centres, which is more like summaries than noise alone."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, width), dtype=np.float32)
    rows = rng.standard_normal((count, width), dtype=np.float32)
    rows += centres[rng.integers(0, 1000, count)]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def numpy_product(bank: Rows, queries: Rows) -> None:
    out = np.empty((len(queries), PIECE_ROWS), np.float32)
    for first in range(0, len(bank), PIECE_ROWS):
        piece = bank[first : first + PIECE_ROWS]
        np.matmul(queries, piece.T, out=out[:, : len(piece)])


def torch_product(bank: Rows, queries: Rows) -> None:
    all_queries, whole = torch.from_numpy(queries), torch.from_numpy(bank)
    out = torch.empty(len(queries), PIECE_ROWS)
    for piece in whole.split(PIECE_ROWS):
        torch.mm(all_queries, piece.T, out=out[:, : len(piece)])


def ours(bank: Rows, queries: Rows, device: str = "cpu") -> NDArray[np.int64]:
    search = NeighbourSearch(queries, K, device=device)
    for first in range(0, len(bank), PIECE_ROWS):
        piece = bank[first : first + PIECE_ROWS]
        search.add(np.arange(first, first + len(piece)), piece)
    return search.result().rows


def scikit_learn(bank: Rows, queries: Rows, metric: str) -> NDArray[np.int64]:
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=metric).fit(bank)
    return index.kneighbors(queries, return_distance=False)


def compare(args: argparse.Namespace) -> None:
    bank, queries = features(args.bank, args.width, 1), features(args.queries, args.width, 2)
    ways: dict[str, Callable[[], object]] = {
        "matrix product, numpy": lambda: numpy_product(bank, queries),
        "matrix product, torch": lambda: torch_product(bank, queries),
        "radio-eval": lambda: ours(bank, queries, args.device),
        # Of unit rows the nearest by distance are the nearest by cosine, and scikit-learn has a fast path for distances.
        "scikit-learn, euclidean": lambda: scikit_learn(bank, queries, "euclidean"),
        "scikit-learn, cosine": lambda: scikit_learn(bank, queries, "cosine"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, object] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = min(medians["matrix product, numpy"], medians["matrix product, torch"])
    fastest = min(value for name, value in medians.items() if name.startswith("scikit"))
    print(f"{'':26} {'seconds':>8} {'x product':>9}   all rounds")
    for name, median in medians.items():
        print(f"{name:26} {median:8.2f} {median / floor:9.2f}   {', '.join(f'{value:.2f}' for value in seconds[name])}")
    mine, theirs = (np.asarray(results[name]) for name in ("radio-eval", "scikit-learn, euclidean"))
    same = np.mean(np.sort(mine, axis=1) == np.sort(theirs, axis=1))
    print(f"neighbours that scikit-learn finds too: {same:.4%}; {fastest / medians['radio-eval']:.2f} times its speed")


def stream(args: argparse.Namespace) -> None:
    def pieces() -> Iterator[tuple[NDArray[np.int64], Rows]]:
        for number, first in enumerate(range(0, args.bank, PIECE_ROWS)):
            rows = np.arange(first, min(first + PIECE_ROWS, args.bank))
            yield rows, features(len(rows), args.width, 10 + number)

    search = NeighbourSearch(features(args.queries, args.width, 2), K, device=args.device)
    spent = 0.0
    for rows, piece in pieces():
        started = time.perf_counter()
        search.add(rows, piece)
        spent += time.perf_counter() - started
    started = time.perf_counter()
    search.result()
    spent += time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"search {spent:.1f} s, peak memory of the process {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    print(
        f"# {datetime.now(UTC):%Y-%m-%d}, radio-cache {radio_cache.__version__}, FAISS {faiss.__version__}, "
        f"scikit-learn {sklearn.__version__}, numpy {np.__version__}, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}, {threads} threads, {args.device}; "
        f"bank {args.bank:,} x {args.width}, {args.queries:,} queries, k = {K}"
    )
    (stream if args.stream else compare)(args)


if __name__ == "__main__":
    main()
