"""Statistics of features: moments, fidelity, PHI-S and Hadamard matrices."""
