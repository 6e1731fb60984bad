"""One encoder's k-NN: encode the queries, stream the bank past them, and let the neighbours vote in every feature space."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.encoders import OWN, Encoder
from evals.encoders.counted import CountedImages
from evals.knn.search import NeighbourSearch
from evals.knn.vote import num_voters, vote
from evals.shared.devices import Device
from evals.shared.image_set import ImageSet
from evals.shared.progress import Progress


@dataclass(frozen=True)
class SpaceVotes:
    """The votes in one feature space.

    Attributes:
        labels: (n,), the true classes of the queries that could be read.
        ranked: number of neighbours -> (n, 5) classes by falling vote, see `vote`.
        num_voters: neighbours that voted for the largest k; fewer than k where the bank is smaller.
        similarity: (n, k) cosines of the neighbours, best first; -inf where the bank is smaller.
        width: values of a summary.
    """

    labels: NDArray[np.int64]
    ranked: dict[int, NDArray[np.int64]]
    num_voters: int
    similarity: NDArray[np.float64]
    width: int


def classify_images(
    encoder: Encoder,
    bank: ImageSet,
    queries: ImageSet | None,
    *,
    ks: Sequence[int],
    temperature: float,
    device: Device = "auto",
    progress: Progress | None = None,
) -> dict[str, SpaceVotes]:
    """Let the nearest images of the bank vote for the class of every query, in the feature spaces of an encoder.

    Summaries need not be normalised. Similarities are computed in float32, votes are summed in float64. Only the features of
    the queries stay in memory, never those of the whole bank.

    Args:
        encoder: an untrained student is classified by its own summary alone, because its untrained heads mean nothing.
        bank: the labelled images that vote.
        queries: labelled with the bank's class numbers; None classifies every image of the bank by the others
            (leave-one-out): an image never votes for itself, a copy of it does.
        ks: numbers of neighbours; each is clamped to the images that can vote.
        temperature: scales the votes, above 0.
        device: where neighbours are searched.
        progress: receives the number of images encoded, if the encoder runs a model.

    Returns:
        Feature space -> votes.

    Raises:
        EvalError: for an empty bank or query set, or features that are not finite.
        ConfigError: for k < 1, a temperature that is not positive, or a GPU where there is none.
        ShapeError: if summaries of bank and queries differ in width.
    """
    leave_one_out = queries is None
    classified = bank if queries is None else queries
    # The neighbours of a smaller k are the first of these.
    largest_k = max(ks)
    num_voters(len(bank), len(classified), largest_k, leave_one_out=leave_one_out)  # refuse empty sets before encoding
    on_images = CountedImages(encoder, len(bank) + (0 if queries is None else len(queries)), progress)
    encoded = encoder.summaries(classified, on_images=on_images)
    spaces = encoder.spaces if encoder.kind != "untrained" else (OWN,)
    # Positions in the bank are its row numbers, so a left-out query is its own position.
    excluded_rows = encoded.positions if leave_one_out else None
    searches = {
        space: NeighbourSearch(
            encoded.summaries[space], min(largest_k, len(bank)), excluded_rows=excluded_rows, device=device
        )
        for space in spaces
    }
    for block in [encoded] if leave_one_out else encoder.blocks(bank, on_images=on_images):
        for space, search in searches.items():
            # One pass of the model over the bank serves all feature spaces.
            search.add(block.positions, block.summaries[space])
    # Images that could not be read have no position, so they are not counted as wrong.
    labels = classified.labels[encoded.positions]
    votes: dict[str, SpaceVotes] = {}
    for space, search in searches.items():
        # Counted anew: images that turned out to be unreadable cannot vote.
        voters = num_voters(search.num_rows, len(labels), largest_k, leave_one_out=leave_one_out)
        neighbours = search.result()
        ranked = {k: vote(neighbours.first(k), bank.labels, temperature=temperature) for k in ks}
        votes[space] = SpaceVotes(labels, ranked, voters, neighbours.similarity, encoded.summaries[space].shape[1])
    return votes
