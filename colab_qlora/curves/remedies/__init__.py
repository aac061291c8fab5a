"""What to change for each verdict, with the values that follow from the run's settings."""
