"""The trainer (a thin subclass of TRL's), its arguments, callbacks and resuming."""

from colab_qlora.models.quiet_import import import_bitsandbytes

# before trl, which imports it too, with a warning on every CPU machine
import_bitsandbytes()
