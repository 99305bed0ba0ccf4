"""Messages of our dependencies that say nothing to a user of this project, each with its reason.

Called by programs as they start, never by a library.
"""

import logging
import warnings


def quiet() -> None:
    """Silence what is known and harmless; everything else is still heard."""
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # peft says that an adapter cannot be merged, which here none ever is, and which of gpt2's layers are Conv1D.
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
    # bitsandbytes offers to download a kernel from the Hub; ours are the ones it ships.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers draws a bar for every checkpoint it loads; programs here print their own progress.
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
