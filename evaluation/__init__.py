"""What a trained network can do.

Predictions, calibration, errors, robustness, heatmaps, and their figures.
"""
