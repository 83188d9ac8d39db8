# SPDX-License-Identifier: Apache-2.0
"""Nodes for ComfyUI: load, draft, finish, decode (docs/comfyui.md).

A file in ComfyUI's folder `custom_nodes` imports the two names below. Torch is imported when a node
runs.
"""

from pw_runtime.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
