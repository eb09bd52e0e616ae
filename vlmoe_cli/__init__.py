"""Command line of vlmoe."""
