"""Kernel repositories: choosing a build variant, checking its files, importing it."""
