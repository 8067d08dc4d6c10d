"""Checkpoints as Hugging Face Transformers reads them, and back: export, load, push."""
