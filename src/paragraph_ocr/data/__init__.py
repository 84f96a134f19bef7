"""Paragraphs: text, rendering, stores, batches, augmentation. Never imports the model or the config."""
