"""Training: settings, recipes, runs that can be interrupted.

`python -m training` trains without the notebook.
"""
