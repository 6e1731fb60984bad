"""Predict bytes, hours and break-even of a build from a short measurement."""
