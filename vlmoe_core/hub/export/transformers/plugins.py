"""Plug-ins by name. In an exported repository a generated file that knows those that went along."""

from vlmoe_core.config import plugin_module

__all__ = ["plugin_module"]
