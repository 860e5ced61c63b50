"""Machinery with nothing of RLHF in it. README.md says what a script needs of it, in four sentences."""
