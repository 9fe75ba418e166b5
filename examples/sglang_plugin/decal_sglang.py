"""What SGLang runs in each of its processes when this package is installed: ``SGLANG_PLUGINS=`` other names leave it out."""

from decal.serving.sglang import register


def plugin() -> None:
    """Make ``--sampling-backend decal`` known. ``register(others=True)`` lets other custom logit processors be."""
    register()
