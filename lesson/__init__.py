"""What else the notebook needs: explorers, checks of exercises, sentences about results."""
