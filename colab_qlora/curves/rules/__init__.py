"""The rules of the diagnosis, and the numbers that they read off a log."""
