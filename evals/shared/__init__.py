"""What several evaluations share: image sets, progress, notes, charts, devices, published figures."""
