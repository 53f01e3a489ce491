"""The command ``eroseg``."""
