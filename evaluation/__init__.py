"""The evaluation of a trained network: predictions, errors, heatmaps, and their figures."""
