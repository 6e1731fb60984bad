"""The monitoring of a run: metrics, TensorBoard, Weights & Biases, pictures, online k-NN."""
