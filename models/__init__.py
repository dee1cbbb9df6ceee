"""The networks, how they are trained, and how they are explained."""
