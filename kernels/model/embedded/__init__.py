"""The embedded model: config.json, model.safetensors and tokenizer.json, shipped as package data."""
