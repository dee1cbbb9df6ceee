"""Measurements of accuracy and speed: python -m benchmarks.accuracy, python -m benchmarks.speed."""
