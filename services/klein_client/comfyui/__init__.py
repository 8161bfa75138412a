"""Nodes for ComfyUI: a folder in `custom_nodes` that imports these two names offers them."""

from klein_client.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
