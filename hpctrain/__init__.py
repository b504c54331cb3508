"""hpctrain: synchronous large-batch training of image classifiers, and how well it scaled."""

__version__ = "0.1.0"
