"""The trainer (a thin subclass of TRL's), its arguments, callbacks and resuming."""
