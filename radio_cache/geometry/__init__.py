"""Crop geometry: from image pixels to teacher input to grid coordinates, once, without tensors."""
