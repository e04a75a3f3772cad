"""Objectives: what a training update minimises. Plug-ins, named by a short name or a dotted path."""
