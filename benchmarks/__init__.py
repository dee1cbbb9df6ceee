"""Measurements of accuracy, speed and scaling, and the report that README.md shows of them."""
