"""What only the notebook needs.

Explorers, checks of the exercises, how cells report errors and time.
"""
