"""Accuracy evidence: golden outputs from Hugging Face's own modules, and how far a run of the model is from them."""
