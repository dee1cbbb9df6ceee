"""What the notebook needs besides: explorers, checks of exercises, sentences about results."""
