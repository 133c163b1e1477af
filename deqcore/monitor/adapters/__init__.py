"""A monitor in the training loops of others.

They import the other library when they are called, so that nothing here needs it.
"""

from deqcore.monitor.adapters.lightning import lightning_callback
from deqcore.monitor.adapters.transformers import transformers_callback

__all__ = ["lightning_callback", "transformers_callback"]
