"""What only the notebook needs: explorers, checks of exercises, errors and times of its cells."""
