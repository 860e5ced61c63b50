"""Machinery with nothing of RLHF in it. Nobody needs it to follow a script."""
