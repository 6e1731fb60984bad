"""What a run reports while it trains: metrics, TensorBoard, Weights & Biases, pictures, online k-NN."""
