"""Layers of a model as a checked Core ML package."""
