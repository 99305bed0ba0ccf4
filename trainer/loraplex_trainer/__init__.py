"""Data in, adapter out, with a receipt: fine-tunes one LoRA adapter on a frozen, usually 4-bit, base model."""
