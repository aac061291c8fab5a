"""The parts of a loss picture: curves, marks, axes, labels and where they go."""
