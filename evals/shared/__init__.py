"""Shared by several evaluations: image sets, progress, notes, charts, devices, published figures."""
