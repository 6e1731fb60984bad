"""The k-NN protocol of DINO and RADIO (arXiv 2104.14294, 2312.06709): the 20 nearest vote with exp(cosine / 0.07)."""

PAPER_K = 20
"""Neighbours that vote."""

PAPER_TEMPERATURE = 0.07
"""A neighbour's vote counts exp(cosine similarity / temperature)."""
