"""The library behind the commands, in storeys: flow and models; data; evaluation, inference and training."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`from isonext import FlowStylePipeline` imports torch; `import isonext` does not."""
    if name == "FlowStylePipeline":
        from isonext.inference.flow_style import FlowStylePipeline

        return FlowStylePipeline
    raise AttributeError(f"module 'isonext' has no attribute {name!r}")
