"""The parts of the explorer and the panel: widgets, the view that they set, the choice of runs."""
