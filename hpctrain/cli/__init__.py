from hpctrain.cli.commands import app, main

__all__ = ["app", "main"]
