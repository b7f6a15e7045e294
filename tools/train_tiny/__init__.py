"""Trains, exports and measures the small DeepSeek-V3 model that the package ships.

From the repository's root, in this order: corpus, train (on a GPU), export, goldens, evaluate.
"""
